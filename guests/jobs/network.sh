# For jobs on the network: addresses, and streams of many bytes with their checksums.
#
# Set before: address (dhcp, or ADDRESS/LENGTH), mib (how much is sent at once, a
# multiple of 16)

ip=$address unit=16
gateway() { ip route | awk '/^default/ { print $3; exit }'; }

# What is sent: the same random bytes again and again. CRC-32 is what this CPU has
# instructions for; anything better would be most of the time.
prepare() {
    dd if=/dev/urandom of=/tmp/pattern bs=1M count=$unit 2>/dev/null
    sum=$(stream | debian cksum)
}
stream() { debian sh -c "for n in \$(seq $((mib / unit))); do cat /tmp/pattern; done"; }
# connect ADDRESS PORT COMMAND: with the connection as descriptor 3. The other end may only
# be about to listen.
connect() {
    debian bash -c '
        for try in $(seq 30); do
            { exec 3<>"/dev/tcp/$0/$1"; } 2>/dev/null && break
            sleep 1
        done
        eval "$2"
    ' "$@"
}
# send ADDRESS PORT: to one who says something first. Debian 12's passt resets a connection
# whose server has said nothing for half a minute.
send() {
    stream | connect "$1" "$2" 'read -r -N 1 -u 3 && cat >&3' && echo "init: sent $sum"
}
# fetch ADDRESS PORT
fetch() { received "$(connect "$1" "$2" 'cksum <&3')"; }
# receive PORT: from whoever connects
receive() {
    received "$(debian perl -MIO::Socket::INET -e '
        $listener = IO::Socket::INET->new(Listen => 1, LocalPort => shift, ReuseAddr => 1) or die;
        print STDERR "init: listening\n";
        $peer = $listener->accept or die;
        syswrite $peer, "!" or die;
        open STDIN, "<&", $peer;
        exec "cksum";
    ' "$1")"
}
# received "CHECKSUM LENGTH"
received() {
    echo "init: received $1"
    [ "${1#* }" = $((mib << 20)) ]
}

check debian mount_debian
check found wait_for /sys/class/net/eth0
check configure configure
