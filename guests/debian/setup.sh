# Makes an unpacked Debian fit for a guest. Run by `cargo xtask debian-image` through
# mmdebstrap, before the tree becomes a file system: $1 is the tree, $uuid the UUID that the
# file system will have.

cat >"$1/etc/fstab" <<END
UUID=$uuid / ext4 errors=remount-ro 0 1
END

echo debian >"$1/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 debian\n::1 localhost\n' >"$1/etc/hosts"
echo 'LANG=C.UTF-8' >"$1/etc/default/locale"
chmod 644 "$1/etc/hostname" "$1/etc/hosts" "$1/etc/fstab" "$1/etc/default/locale"

# A test image: whoever reaches a console is root.
chroot "$1" passwd --quiet --delete root

cat >"$1/etc/systemd/network/80-dhcp.network" <<'END'
[Match]
Name=en* eth*

[Network]
DHCP=yes
END
chroot "$1" systemctl --quiet enable systemd-networkd.service serial-getty@ttyS0.service
# Nothing here needs the network to be up, and a guest may have none.
chroot "$1" systemctl --quiet disable systemd-networkd-wait-online.service

# systemd looks for hvc0 once, early; its driver may come later, as a module.
cat >"$1/etc/udev/rules.d/80-console.rules" <<'END'
SUBSYSTEM=="tty", KERNEL=="hvc0", TAG+="systemd", ENV{SYSTEMD_WANTS}+="serial-getty@hvc0.service"
END

# Work that an ordinary machine does behind one's back would only blur tests.
chroot "$1" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer \
    e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer

# A CPU in software on a busy host takes its time; that is no reason to give units up.
mkdir -p "$1/etc/systemd/system.conf.d"
cat >"$1/etc/systemd/system.conf.d/patience.conf" <<'END'
[Manager]
DefaultTimeoutStartSec=10min
DefaultDeviceTimeoutSec=10min
END
chmod 755 "$1/etc/systemd/system.conf.d"
chmod 644 "$1/etc/systemd/system.conf.d/patience.conf"

# Options for dpkg that were meant for the making only.
rm -f "$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
