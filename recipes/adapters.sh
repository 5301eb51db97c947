#!/bin/sh
# Trains the shipped adapters: adapters.sh TRAINER DATA OUT [NAME...], with the data that data.py made. Replaces what is there.
# compress.py, for which PYTHONPATH has to lead to PyTorch, makes those small that have pairs everywhere.
set -eu
trainer=$1 data=$2 out=$3
shift 3
[ $# -gt 0 ] || set -- movie-reviews book-reviews news-topics fairy-tales

train() {
    name=$1
    shift
    "$trainer" lora --out "$out/$name" --overwrite "$@"
}

compress() {
    made=$out/$1
    shift
    python3 "$(dirname "$0")/compress.py" "$made" 3 "$@"
}

for name; do
    case $name in
    movie-reviews)
        # What book-reviews goes on from has all ranks.
        "$trainer" lora --out "$data/movie-reviews/all-ranks" --overwrite --task classify \
            --data "$data/movie-reviews/train.csv" --eval "$data/movie-reviews/test.csv" \
            --rank 16 --target-modules all-linear --dropout 0.05 --learning-rate 3e-4 --schedule cosine --epochs 2 \
            --eval-every 235
        rm -rf "$out/$name"
        cp -r "$data/movie-reviews/all-ranks" "$out/$name"
        compress "$name" "$out/$name"
        ;;
    book-reviews)
        # What movie-reviews has learned from sentences; then how longer reviews come to their verdict; then hard ones.
        short=$data/book-reviews/after-short
        "$trainer" lora --out "$short" --overwrite --task classify --data "$data/book-reviews/short.csv" \
            --init-adapter "$data/movie-reviews/all-ranks" --rank 16 --target-modules all-linear --dropout 0.05 \
            --learning-rate 2e-4 --schedule cosine --epochs 1 --eval-every 60
        train "$name" --task classify --data "$data/book-reviews/hard.csv" --init-adapter "$short" \
            --rank 16 --target-modules all-linear --dropout 0.05 --learning-rate 3e-4 --schedule cosine --epochs 2 \
            --eval-share 0.05 --eval-every 1000
        compress "$name" "$out/$name"
        ;;
    news-topics)
        train "$name" --task classify --data "$data/news-topics/train.csv" --eval "$data/news-topics/test.csv" \
            --max-length 128 --epochs 2 --batch-size 8
        ;;
    fairy-tales)
        # The mean of two that differ in how fast the rate falls: of the first, what is best half way counts.
        for run in "first --epochs 4 --eval-every 49 --patience 1" "second --epochs 2"; do
            set -- $run
            half=$data/fairy-tales/$1
            shift
            "$trainer" lora --out "$half" --overwrite --task generate \
                --data "$data/fairy-tales/train.jsonl" --eval "$data/fairy-tales/test.jsonl" \
                --target-modules all-linear --dropout 0.1 --learning-rate 1e-3 --schedule cosine --batch-size 4 "$@"
        done
        rm -rf "$out/$name"
        compress "$name" "$data/fairy-tales/first" "$data/fairy-tales/second"
        ;;
    *)
        echo "adapters.sh: no recipe for $name" >&2
        exit 2
        ;;
    esac
done
