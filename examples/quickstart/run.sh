#!/usr/bin/env bash
# From nothing to a language model that stock transformers loads: corpus, tokenizer, training, export, sample.
# Run by `make quickstart`; a second run resumes, and finds everything done. Sizes are set by ds_configs/v1_tiny.json.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one core per rank

step() { printf '\n== %s\n' "$*"; }

step "1/6 corpus: the Python standard library's documentation and sources"
[ -d data/raw ] || python -m megatron_ds.data.corpus data/raw

step "2/6 tokenizer: byte-level BPE"
[ -d data/tokenizer ] || megatron-ds train-tokenizer --input data/raw --vocab-size 4096 --output data/tokenizer

step "3/6 token files: data/corpus.bin and data/corpus.idx"
[ -f data/corpus.idx ] || megatron-ds prepare-data --input data/raw --tokenizer data/tokenizer --output-prefix data/corpus

step "4/6 training: two pipeline stages, 1F1B"
deepspeed --num_gpus 2 pretrain.py --deepspeed_config ds_configs/v1_tiny.json --data-path data/corpus

step "5/6 export to Hugging Face, and check it against the trained model"
megatron-ds export-hf --load runs/v1_tiny/checkpoints --output export/v1_tiny --verify --force

step "6/6 sample from stock transformers"
python examples/quickstart/sample.py --model export/v1_tiny --run runs/v1_tiny
