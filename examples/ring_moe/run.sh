#!/usr/bin/env bash
# A small mixture of experts on four expert-parallel ranks with the ring exchange: training, export, expert table.
# Takes the quickstart's corpus and tokenizer where they are there already; a second run resumes, and finds everything
# done. Sizes are set by ds_configs/v2_tiny.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread per rank

step() { printf '\n== %s\n' "$*"; }

step "1/4 data: the quickstart's corpus, tokenizer and token files"
[ -d data/raw ] || python -m megatron_ds.data.corpus data/raw
[ -d data/tokenizer ] || megatron-ds train-tokenizer --input data/raw --vocab-size 4096 --output data/tokenizer
[ -f data/corpus.idx ] || megatron-ds prepare-data --input data/raw --tokenizer data/tokenizer --output-prefix data/corpus
ls data/corpus.bin data/corpus.idx data/tokenizer/tokenizer.json

step "2/4 training: 8 experts on 4 ranks, ring exchange"
deepspeed --num_gpus 4 pretrain.py --deepspeed_config ds_configs/v2_tiny.json --data-path data/corpus

step "3/4 export to Hugging Face, and check it against the trained model"
megatron-ds export-hf --load runs/v2_tiny/checkpoints --output export/v2_tiny --verify --force

step "4/4 experts: the load of every layer at the last step"
megatron-ds experts --run runs/v2_tiny
