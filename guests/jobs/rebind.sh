# Takes the drivers of a disk and of a network card away under load and gives them back,
# again and again. After each round both must work.
#
# Set before: rounds, port (where the gateway takes and drops whatever it gets)

ip=dhcp
gateway() { ip route | awk '/^default/ { print $3; exit }'; }
bus=/sys/bus/virtio/drivers
disk_works() {
    dd if=/tmp/mark of=/dev/vda bs=64k seek="$1" conv=fsync 2>/dev/null &&
        forget_caches &&
        dd if=/dev/vda bs=64k skip="$1" count=4 2>/dev/null | cmp - /tmp/mark
}
card_works() {
    ip link set eth0 up && ip address add "$address" dev eth0 && ip route add default via "$gateway" &&
        echo works | timeout 10 nc "$gateway" "$port"
}
# Which part of a round it was that failed.
says() {
    what=$1
    shift
    "$@" || { echo "init: rebind: $what"; ip address show; ip route; false; }
}
round() {
    # Under a name of our own: a writer that comes too late would make /dev/vda a plain file.
    rm -f /tmp/disk && mknod /tmp/disk b $(tr : ' ' </sys/block/vda/dev) || return 1
    # The errors of these are what losing a device looks like.
    for part in 0 1; do
        dd if=/tmp/disk of=/dev/null bs=64k iflag=direct skip=$((part * 64)) count=4096 2>/dev/null &
        dd if=/dev/zero of=/tmp/disk bs=16k oflag=direct seek=$((part * 1024 + 1024)) count=1024 2>/dev/null &
        nc "$gateway" "$port" </dev/zero >/dev/null 2>&1 &
        senders="$senders $!"
    done
    usleep $(($1 % 10 * 30000 + 10000))
    echo "$disk" >$bus/virtio_blk/unbind
    echo "$card" >$bus/virtio_net/unbind
    says "still there" [ ! -e /dev/vda ] && says "still there" [ ! -e /sys/class/net/eth0 ] || return 1
    # A sender whose address is gone may wait for an answer for a long time.
    kill $senders 2>/dev/null
    senders=
    wait
    echo "$card" >$bus/virtio_net/bind
    echo "$disk" >$bus/virtio_blk/bind
    says "no disk" wait_for /dev/vda && says "no card" wait_for /sys/class/net/eth0 &&
        says "disk" disk_works "$1" && says "card" card_works
}

wait_for /dev/vda
check found wait_for /sys/class/net/eth0
check configure configure
address=$(ip -4 -o address show dev eth0 | awk '{ print $4 }') gateway=$(gateway) senders=
disk=$(basename "$(readlink /sys/block/vda/device)")
card=$(basename "$(readlink /sys/class/net/eth0/device)")
dd if=/dev/urandom of=/tmp/mark bs=64k count=4 2>/dev/null
for number in $(seq 1 "$rounds"); do
    check "round-$number" round "$number"
    [ "$failed" = 0 ] || break
done
check quiet-log quiet_log
