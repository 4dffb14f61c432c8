#!/usr/bin/env bash
# A small DeepSeek-V3-class model on every axis at once: tensor 2 (with sequence parallelism) x pipeline 2 (interleaved, two
# chunks per rank) x data 2 = 8 processes, experts over the data axis. Self-test, training, export, sample, schedule.
# Takes the quickstart's corpus and tokenizer where they are there already; a second run resumes, and finds everything
# done. Layout and sizes are set by ds_configs/v3_tiny.json; the run here is a short one of its kind.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread per rank

step() { printf '\n== %s\n' "$*"; }

step "1/6 data: the quickstart's corpus, tokenizer and token files"
[ -d data/raw ] || python -m megatron_ds.data.corpus data/raw
[ -d data/tokenizer ] || megatron-ds train-tokenizer --input data/raw --vocab-size 4096 --output data/tokenizer
[ -f data/corpus.idx ] || megatron-ds prepare-data --input data/raw --tokenizer data/tokenizer --output-prefix data/corpus
ls data/corpus.bin data/corpus.idx data/tokenizer/tokenizer.json

pretrain=(deepspeed --num_gpus 8 pretrain.py --deepspeed_config ds_configs/v3_tiny.json --data-path data/corpus)

step "2/6 self-test: does this layout compute what one process computes?"
if [ -d runs/v3_tiny/checkpoints ]; then echo "passed before the training began"; else "${pretrain[@]}" --self-test; fi

step "3/6 training: tensor 2 x pipeline 2 x data 2, experts on 2 ranks"
"${pretrain[@]}" --global-batch-size 8 --train-iters 140 --lr-warmup-iters 30 --eval-interval 70 --save-interval 70

step "4/6 export to deepseek_v3, and check it against the trained model"
megatron-ds export-hf --load runs/v3_tiny/checkpoints --output export/v3_tiny --target deepseek_v3 --verify --force

step "5/6 sample from stock transformers"
python examples/quickstart/sample.py --model export/v3_tiny --run runs/v3_tiny

step "6/6 the schedule of this run: one optimizer step, passes of equal length"
megatron-ds schedule --deepspeed_config runs/v3_tiny/config.json --world-size 8 --svg export/v3_tiny_schedule.svg
echo "drawn in export/v3_tiny_schedule.svg"
