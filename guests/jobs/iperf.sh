# iperf3, as the server or as the client, both ways; after network.sh.
#
# Set before: server (ADDRESS:PORT, or "gateway:PORT", or empty: be the server), seconds

measure() {
    host=${server%:*}
    [ "$host" != gateway ] || host=$(gateway)
    debian iperf3 -c "$host" -p "${server#*:}" -t "$seconds" -f m "$@" >/tmp/iperf 2>&1 ||
        { sed 's/^/init: iperf3: /' /tmp/iperf; return 1; }
    awk '/receiver/ { for (i = 2; i <= NF; i++) if ($i == "Mbits/sec") print $(i - 1) }' /tmp/iperf >/tmp/rate
    [ -s /tmp/rate ]
}
up() { measure && echo "init: up $(cat /tmp/rate) Mbit/s"; }
down() { measure -R && echo "init: down $(cat /tmp/rate) Mbit/s"; }
if [ -n "$server" ]; then
    check up up
    check down down
else
    serve() { debian iperf3 -s -1 >/dev/null; }
    echo "init: listening"
    check serves-up serve
    check serves-down serve
fi
check quiet-log quiet_log
