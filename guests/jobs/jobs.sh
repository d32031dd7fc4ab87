# Real work for a while, two jobs at a time: one lane compiles and has fio check a disk, the
# other goes through stress-ng's classes. Every job says how it ended. The disk is the one
# with the serial number "scratch".
#
# Set before: seconds (after which no job begins that need not), size (MiB, as in verify.sh);
# the functions of verify.sh; /tmp/project (guests/jobs/project).

uptime() { cut -d. -f1 /proc/uptime; }
end=$(($(uptime) + seconds))
due() { [ "$(uptime)" -ge "$end" ]; }

# job KIND COMMAND...: what it says is only of interest if it fails.
job() {
    kind=$1 begun=$(uptime)
    shift
    echo "init: begin $kind"
    "$@" >"/tmp/$kind.out" 2>&1
    status=$?
    if [ $status = 0 ]; then
        echo "init: done $kind $(($(uptime) - begun))"
    else
        tail -n 300 "/tmp/$kind.out" | sed "s/^/init: $kind: /"
        echo "init: FAIL $kind: status $status"
    fi
}

# compile NUMBER: the project, each time by other options, and what it computes.
compile() {
    case $(($1 % 6)) in
        0) options="-O2" ;;
        1) options="-O0 -g" ;;
        2) options="-O3 -march=x86-64-v2" ;;
        3) options="-Os" ;;
        4) options="-O2 -flto" ;;
        5) options="-O1 -fsanitize=undefined" ;;
    esac
    echo "$options"
    rm -rf /tmp/built && cp -r /tmp/project /tmp/built &&
        debian make -C /tmp/built -j2 "CFLAGS=$options" &&
        debian /tmp/built/parts >/tmp/built/said && diff /tmp/built/said /tmp/project/expected
}

# read_back NUMBER: one of fio's jobs, whose own words go to the console otherwise.
read_back() {
    case $(($1 % 3)) in
        0) mixed "$scratch" ;;
        1) small "$scratch" ;;
        2) cached "$scratch" ;;
    esac
}

# stress STRESSOR... -- OPTION...: two of each for some seconds, who check what they do. One
# that cannot run here, or has done nothing, is no success, whatever the exit status. A host that
# has little time for the vCPUs gets a second chance: some operations take long.
stress() {
    names=
    while [ "$1" != -- ]; do
        names="$names $1"
        shift
    done
    shift
    workers=$(for name in $names; do echo "--$name 2"; done)
    for seconds in 5 60; do
        stress_for $seconds $workers "$@" || return $?
        idle=
        for name in $names; do
            # "stress-ng: metrc: [PID] NAME OPERATIONS SECONDS ..."
            awk -v name="$name" '/metrc|info/ && $4 == name && $5 > 0 { found = 1 } END { exit !found }' /tmp/stress.out ||
                idle=$name
        done
        [ -n "$idle" ] || return 0
        echo "$idle has done nothing in $seconds s"
    done
    return 101
}

# stress_for SECONDS OPTION...
stress_for() {
    seconds=$1
    shift
    debian stress-ng --timeout "$seconds" --verify --metrics-brief --temp-path /tmp "$@" >/tmp/stress.out 2>&1
    status=$?
    cat /tmp/stress.out
    [ $status = 0 ] || return $status
    if grep -E 'skipp|not implemented|no resource|terminated' /tmp/stress.out; then
        echo "not all of it was run"
        return 100
    fi
}

# Nothing went wrong that the kernel knows of: its own faults, programs that died, devices.
calm() {
    quiet_log 'lockup|blocked for more than|stalled|unable to handle|general protection|protection fault|invalid opcode|segfault|traps:|bad page|corrupt|oom-kill|Out of memory|I/O error|I/O scheduler|EXT4-fs (error|warning)|timed out|resetting' >/tmp/uncalm ||
        { dmesg | tail -n 200; cat /tmp/uncalm; false; }
}

work() {
    number=0
    until due; do
        job compile compile $number
        job fio read_back $number
        number=$((number + 1))
    done
}
# All of them once, however little time there is.
torment() {
    until due; do
        job stress-cpu stress cpu -- --cpu-method all
        job stress-vm stress vm -- --vm-bytes 32M --vm-method all
        job stress-fork stress fork vfork --
        job stress-signal stress signal sigsegv sigfpe sigtrap sigq --
        job stress-mmap stress mmap mremap -- --mmap-bytes 4M --mremap-bytes 4M
        job stress-futex stress futex --
        job stress-switch stress switch --
        job stress-cache stress cache icache --
        job kernel-log calm
    done
}

check debian mount_debian
scratch=$(disk_of scratch)
check scratch test -n "$scratch"
echo "init: working"
work &
torment &
wait
check quiet-log calm
