#!/bin/sh
# The whole way once: photos -> .beton -> training -> k-NN. DATA= is a folder with train/ and val/ (class
# folders below), or any photo folder; without it, pictures are drawn.
set -eu
PY="${PY:-.venv/bin/python}"
RUN="${RUN:-runs/first}"
DATA="${DATA:-}"

if [ -e "$RUN/checkpoint.pt" ]; then
    echo "error: $RUN already holds a run; remove it or give another: make train RUN=runs/second" >&2
    exit 2
fi
if [ -z "$DATA" ]; then
    DATA=data/drawn
    [ -d "$DATA/val" ] || "$PY" -m pipeline.drawn_photos "$DATA" --images-per-class 300 --val-per-class 50
fi
mkdir -p "$RUN"
if [ -d "$DATA/train" ] && [ -d "$DATA/val" ]; then
    "$PY" -m pipeline.convert "$DATA/train" "$RUN/train.beton" --overwrite
    "$PY" -m pipeline.convert "$DATA/val" "$RUN/val.beton" --overwrite
    set -- --eval-train "$RUN/train.beton" --eval-val "$RUN/val.beton" --eval-every 5
else
    echo "k-NN is left out: $DATA has no train/ and val/ folders of classes"
    "$PY" -m pipeline.convert "$DATA" "$RUN/train.beton" --overwrite
    set -- --eval-every 0
fi
# A ViT for two cores and a few minutes: small crops, small head, short schedules.
"$PY" train.py --data "$RUN/train.beton" --output-dir "$RUN" --arch vit_t "$@" \
    --embed-dim 128 --depth 6 --num-heads 4 --patch-size 8 --image-size 64 \
    --global-crops-size 64 --local-crops-size 32 --local-crops-number 4 --batch-size 64 \
    --out-dim 1024 --hidden-dim 512 --bottleneck-dim 128 --warmup-teacher-temp-epochs 5 \
    --epochs 20 --warmup-epochs 3 --lr 2e-3 --min-lr 1e-5 --momentum-teacher 0.99
