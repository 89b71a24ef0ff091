# Sourced by the test scripts: named steps with quiet output, a log each, and a summary whose exit status is the truth.
#
#   step "name" command...   runs it; output goes to the log, and to the screen when it fails
#   step_shown "name" ...    the same, with the output on the screen as it comes
#   some_tests command...    fails when no test ran; loom_models is such a command
#   summary                  prints every step with its result and seconds; returns 1 when one failed
#
# Needs LOGS, a folder for the logs. Colours only on a terminal and without NO_COLOR.

if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
    bold=$'\e[1m' green=$'\e[32m' red=$'\e[31m' yellow=$'\e[33m' plain=$'\e[0m'
    export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-always}"
else
    bold= green= red= yellow= plain=
    export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"
fi
export CARGO_TERM_PROGRESS_WHEN=never

results=()
steps_failed=0

say() { printf '%s\n' "$*"; }
note() { say "${yellow}note: $*${plain}"; }

_record() { # name status seconds
    local word="${green}ok    ${plain}"
    if [ "$2" -ne 0 ]; then
        word="${red}FAILED${plain}"
        steps_failed=$((steps_failed + 1))
    fi
    results+=("$(printf '%s %5d s  exit %-3d  %s' "$word" "$3" "$2" "$1")")
}

step() {
    local name="$1" status=0 start=$SECONDS
    shift
    local log="$LOGS/${name//[^A-Za-z0-9]/-}.log"
    say "${bold}== $name${plain}"
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [ "$status" -ne 0 ]; then
        cat "$log"
        say "${red}$name failed (exit $status)${plain}: $*"
    else
        grep -E '^(test result:|[[:space:]]*Summary |[[:space:]]*Finished )|^skipped: ' "$log" | sort | uniq -c | sed 's/^ *1 //; s/^ */   /' | tail -n 12
    fi
    _record "$name" "$status" $((SECONDS - start))
    return 0
}

step_shown() {
    local name="$1" status=0 start=$SECONDS
    shift
    local log="$LOGS/${name//[^A-Za-z0-9]/-}.log"
    say "${bold}== $name${plain}"
    "$@" </dev/null 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || say "${red}$name failed (exit $status)${plain}: $*"
    _record "$name" "$status" $((SECONDS - start))
    return 0
}

# Runs a command whose tests must not be none: a filter that matches nothing passes, and shows nothing.
some_tests() {
    local out status=0
    out=$("$@" 2>&1) || status=$?
    printf '%s\n' "$out"
    [ "$status" -eq 0 ] || return "$status"
    grep -Eq '^running [1-9]' <<<"$out" || { say "no test ran"; return 1; }
}

# Every interleaving of the lock-free parts, up to three preemptions (the bound stands in shm/src/models.rs).
loom_models() {
    some_tests env RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom \
        timeout 900 cargo test -p praas-shm --release --lib --locked models
}

summary() {
    say
    say "${bold}== summary${plain}"
    printf '%s\n' "${results[@]}"
    say "$SECONDS s in all; logs in ${LOGS#"$PWD"/}/"
    if [ "$steps_failed" -ne 0 ]; then
        say "${red}${bold}$steps_failed of ${#results[@]} steps failed${plain}"
        return 1
    fi
    say "${green}${bold}all ${#results[@]} steps passed${plain}"
}
