# Measures a disk and a network card; after network.sh. The disk is the one with the serial
# number "scratch". Each measurement waits between two lines, so that whoever watches can
# read the monitor's clocks.
#
# Set before: port (of an iperf3 server at the gateway), echo (a port at the gateway where
# each byte comes back), seconds

scratch=$(disk_of scratch)
server=$(ip route | awk '/^default/ { print $3; exit }')
measured() {
    echo "init: begin $1"
    name=$1
    shift
    "$@" >/tmp/value 2>/tmp/said || { sed 's/^/init: said: /' /tmp/said /tmp/value; return 1; }
    value=$(cat /tmp/value)
    [ -n "$value" ] && echo "init: end $name $value"
}
# KiB/s, or operations each second. Fields as of fio 3's terse version 3.
terse() {
    field=$1
    shift
    debian fio --name=x --filename="$scratch" --direct=1 --ioengine=libaio --time_based \
        --runtime="$seconds" --size=192m --minimal --terse-version=3 "$@" >/tmp/terse &&
        cut -d';' -f"$field" /tmp/terse | tail -1
}
rate() {
    debian iperf3 -c "$server" -p "$port" -t "$seconds" -f m "$@" >/tmp/iperf &&
        awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i == "Mbits/sec") print $(i - 1) }' /tmp/iperf
}
# Microseconds for a byte to the host and back. ICMP is not for every user.
round_trip() {
    debian perl -MIO::Socket::INET -e '
        sub now() { open my $uptime, "<", "/proc/uptime" or die; (split " ", <$uptime>)[0] }
        $peer = IO::Socket::INET->new(PeerAddr => shift, PeerPort => shift) or die;
        setsockopt $peer, 6, 1, 1 or die;
        for ($start = now(); ($took = now() - $start) < $ARGV[0]; ) {
            for (1 .. 50) {
                syswrite $peer, "x" or die;
                sysread $peer, $byte, 1 or die;
                $count++;
            }
        }
        printf "%.0f\n", $took / $count * 1e6;
    ' "$server" "$echo" "$seconds"
}
check found test -n "$scratch"
# Blocks that were never written need no reading.
check fill debian dd if=/dev/zero of="$scratch" bs=1M count=192 oflag=direct status=none
check seq-read measured seq-read terse 7 --rw=read --bs=256k --iodepth=8
check seq-write measured seq-write terse 48 --rw=write --bs=256k --iodepth=8
check rand-read measured rand-read terse 8 --rw=randread --bs=4k --iodepth=16
check rand-write measured rand-write terse 49 --rw=randwrite --bs=4k --iodepth=16
check sync-read measured sync-read terse 8 --rw=randread --bs=4k --iodepth=1
check net-up measured net-up rate
check net-down measured net-down rate -R
check round-trip measured round-trip round_trip
