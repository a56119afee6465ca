#!/usr/bin/env bash
# What `docker run convfirst COMMAND ...` starts: a program of this repository, or any other command.
set -euo pipefail
home=/opt/convfirst

command=${1:-help}
[ $# -eq 0 ] || shift
case $command in
  train) exec python "$home/train.py" "$@" ;;
  smoke_test) exec "$home/docker/smoke_test.sh" "$@" ;;
  help | --help)
    cat <<'TEXT'
docker run --gpus all --shm-size 16g -v "$PWD":/workspace convfirst COMMAND [ARGUMENTS]

train       recipe=convnext_tiny data.root=/data/imagenet trainer.devices=8    (train --help lists everything)
reproduce   paper=convfirst
benchmark   suite=throughput
evaluate    run=runs/convnext_tiny
export      checkpoint=runs/convnext_tiny output=exported/convnext_tiny
write_ffcv  /data/imagenet /data/imagenet-ffcv --preset mixed
smoke_test  what the build ran: kernels' reference, FFCV, one update

So for each of scripts/*.py; anything else is run as it stands. The working directory is /workspace; mount what must stay.
TEXT
    ;;
  *)
    if [ -f "$home/scripts/$command.py" ]; then exec python "$home/scripts/$command.py" "$@"; fi
    exec "$command" "$@"
    ;;
esac
