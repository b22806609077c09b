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
    DATA=data/synthetic
    mkdir -p "$DATA"
    [ -d "$DATA/val" ] || "$PY" -m benchmarks.synthetic.photos "$DATA" --contact-sheet "$DATA/sheet.png" \
        --images-per-class 300 --val-per-class 50
fi
mkdir -p "$RUN"
classes="" photos="$DATA"
if [ -d "$DATA/train" ] && [ -d "$DATA/val" ]; then
    classes=yes photos="$DATA/train"
    "$PY" -m pipeline.convert "$DATA/val" "$RUN/val.beton" --overwrite
    set -- --eval-train "$RUN/train.beton" --eval-val "$RUN/val.beton" --eval-every 4
else
    echo "k-NN is left out: $DATA has no train/ and val/ folders of classes"
fi
"$PY" -m pipeline.convert "$photos" "$RUN/train.beton" --overwrite
# A ViT for two cores and a few minutes: small views, few prototypes, and many small steps with sharp
# targets. Batch norm in the head keeps the photos apart while the network cannot.
"$PY" train.py --data "$RUN/train.beton" --output-dir "$RUN" --arch vit_t "$@" \
    --embed-dim 96 --depth 4 --num-heads 3 --patch-size 8 --drop-path 0 \
    --global-crops-size 32 --global-crops-scale 0.5 1 --local-crops-number 0 --blur-radius 0.1 0.5 \
    --color-jitter 0.2 0.2 0.2 0.1 --batch-size 32 --epochs 40 --warmup-epochs 2 \
    --lr 4e-3 --min-lr 1e-5 --momentum-teacher 0.99 --weight-decay-end 0.1 \
    --out-dim 128 --hidden-dim 256 --bottleneck-dim 64 --norm-in-head bn \
    --warmup-teacher-temp-epochs 1 --warmup-teacher-temp 0.02 --teacher-temp 0.02 \
    --warmup-teacher-patch-temp 0.02 --teacher-patch-temp 0.02 --precision fast --recompute off
# The result beside what it has to beat: the same network before training, and the photos' pixels.
if [ -n "$classes" ]; then
    "$PY" -m evaluation.frozen.knn --checkpoint "$RUN/checkpoint.pt" --train "$RUN/train.beton" \
        --val "$RUN/val.beton" --untrained --pixels --k 20
    "$PY" -m evaluation.show learned --checkpoint "$RUN/checkpoint.pt" --data "$RUN/val.beton" \
        --output "$RUN/learned.png"
    echo "pictures: $RUN/curves.png, $RUN/learned.png"
fi
