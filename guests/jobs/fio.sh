# Random and sequential work with fio on the disks with the serial numbers "raw" and "qcow2".
#
# Set before: the functions of verify.sh

check debian mount_debian
for serial in raw qcow2; do
    disk=$(disk_of "$serial")
    check "$serial-found" test -n "$disk"
    check "$serial-mixed" mixed "$disk"
    check "$serial-small" small "$disk"
    check "$serial-cached" cached "$disk"
done
check quiet-log quiet_log
