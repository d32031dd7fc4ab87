# Writes files to the ext4 file system on the disk with the serial number "scratch" until
# killed, and says of each when it is durable. First it looks at what an earlier run has
# left: the file system must be consistent once its journal has been replayed, and every
# file that was promised to be durable must be there, whole.
#
# On the command line: lguest.first=N and lguest.last=N, the promised files (none if last is
# less than first); lguest.write=no ends after the check.

first=1 last=0 write=yes
for word in $(cat /proc/cmdline); do
    case "$word" in
        lguest.first=*) first=${word#*=} ;;
        lguest.last=*) last=${word#*=} ;;
        lguest.write=*) write=${word#*=} ;;
    esac
done

replay() {
    # 1: something was done, which replaying is.
    debian e2fsck -p "$scratch" >/tmp/e2fsck 2>&1 || [ $? = 1 ] || { sed 's/^/init: e2fsck: /' /tmp/e2fsck; false; }
}
consistent() { debian e2fsck -fn "$scratch" >/tmp/e2fsck 2>&1 || { sed 's/^/init: e2fsck: /' /tmp/e2fsck; false; }; }
promised() {
    number=$first
    while [ "$number" -le "$last" ]; do
        file=$(echo "/mnt/durable/$number"-*)
        [ -e "$file" ] || { echo "init: durable file $number is missing"; return 1; }
        number=$((number + 1))
    done
    durable_files
}
noise() {
    while :; do
        dd if=/dev/urandom of=/mnt/noise bs=64k count=16 2>/dev/null
        for name in 1 2 3 4 5 6 7 8; do
            echo "$name" >"/mnt/noise-$name"
            mv "/mnt/noise-$name" "/mnt/other-$name"
        done
        rm -f /mnt/other-*
    done
}

check debian mount_debian
scratch=$(disk_of scratch)
if ! has_ext4 "$scratch"; then
    check mkfs debian mkfs.ext4 -q -E lazy_itable_init=0 "$scratch"
fi
echo "init: replaying"
check replay replay
check consistent consistent
check mount ext4_mount "$scratch"
mkdir -p /mnt/durable
check promised promised
if [ "$failed" = 0 ] && [ "$write" = yes ]; then
    # From here on nothing is promised: a crash may leave all of them, some or none.
    echo "init: clearing"
    rm -rf /mnt/durable/* && sync && echo "init: cleared"
    noise &
    number=$((last + 1))
    while :; do
        # The name is final only when the contents are durable; then the name is made so.
        dd if=/dev/urandom of=/mnt/durable/new bs=8k count=$((number % 16 + 1)) conv=fsync 2>/dev/null || break
        mv /mnt/durable/new "/mnt/durable/$number-$(checksum </mnt/durable/new)" && sync || break
        echo "init: durable $number"
        number=$((number + 1))
    done
    check writes false
fi
check unmount umount /mnt
check quiet-log quiet_log
