# Many bytes over the network, with checksums; after network.sh.
#
# Set before: steps, of send=ADDRESS:PORT, fetch=ADDRESS:PORT and receive=PORT; the address
# may be "gateway"

peer() { case "$1" in gateway) gateway ;; *) echo "$1" ;; esac; }
prepare
for step in $steps; do
    to=${step#*=}
    case "$step" in
        send=*) check "$step" send "$(peer "${to%:*}")" "${to#*:}" ;;
        fetch=*) check "$step" fetch "$(peer "${to%:*}")" "${to#*:}" ;;
        receive=*) check "$step" receive "$to" ;;
    esac
done
check quiet-log quiet_log
