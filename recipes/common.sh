# What the recipes share; sourced, not run. `--dry-run` prints the commands and runs none of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python}
DRY=
case ${1:-} in
"") ;;
--dry-run) DRY=yes ;;
*)
    echo "usage: $0 [--dry-run]; settings are variables: OUT=runs/mine SEED=1 $0" >&2
    exit 2
    ;;
esac

# A command line as one may paste it.
show() {
    local word
    for word in "$@"; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@#+-]+$ ]]; then printf '%s ' "$word"; else printf '%q ' "$word"; fi
    done
    echo
}

# A command, shown and run. Exit 3 (a judge left too much unscored; everything is written) is said and passed over.
run() {
    show "$PYTHON" "$@"
    if [ -n "$DRY" ]; then return; fi
    local code=0
    "$PYTHON" "$@" || code=$?
    if [ "$code" = 3 ]; then
        echo "caution: a judge left too much unscored in the step above" >&2
    elif [ "$code" != 0 ]; then
        exit "$code"
    fi
}

# step FOLDER SCRIPT FLAGS...: kept where it is finished, gone on with where it was begun, else begun.
step() {
    local folder=$1 script=$2
    shift 2
    if [ -z "$DRY" ] && [ -e "$folder/result.json" ]; then
        echo "# $folder is finished"
    elif [ -z "$DRY" ] && [ -e "$folder/config.json" ]; then
        run "$script" --resume "$folder"
    else
        run "$script" "$@" --out "$folder"
    fi
}
