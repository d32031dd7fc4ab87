# Jobs of fio's that check every block they have written.
#
# Set before: size (MiB of the disk that each of a job's parts uses, of which there are four at
# most)

verify() {
    target=$1 job=$2
    shift 2
    debian fio --name="$job" --filename="$target" --size="${size}m" --verify=crc32c \
        --verify_fatal=1 --verify_dump=0 --verify_state_save=0 --group_reporting --eta=never "$@" >/tmp/fio.out 2>&1
    status=$?
    grep -E 'err=|verify:|IOPS=' /tmp/fio.out | sed 's/^/init: fio: /'
    return $status
}
# Four jobs, each with a part of the disk to itself and 16 requests in flight. Each reads
# what it wrote back, first in passing and then all of it at the end.
mixed() {
    verify "$1" mixed --ioengine=libaio --direct=1 --iodepth=16 --rw=randrw --rwmixwrite=70 \
        --bsrange=4k-64k --blockalign=4k --numjobs=4 --offset_increment="${size}m" \
        --verify_backlog=256
}
# Small blocks written over and over, past the page cache. A block that is on its way is waited for
# before it is written again: of two requests at once, a disk may do either first.
small() {
    verify "$1" small --ioengine=libaio --direct=1 --iodepth=32 --rw=randwrite --bs=4k \
        --numjobs=2 --offset_increment="${size}m" --norandommap --serialize_overlap=1 \
        --io_size="$((size / 2))m" --loops=2
}
# Large blocks through the page cache, made durable every now and then.
cached() {
    verify "$1" cached --ioengine=psync --rw=write --bs=256k --fsync=16 --numjobs=2 \
        --offset_increment="${size}m"
}
