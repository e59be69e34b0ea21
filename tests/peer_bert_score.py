"""The bert-score package over a file of pairs, as the peer of scripts/bench_bertscore.py: MODEL DATA LAYER [--idf]."""

import json
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

warnings.simplefilter("ignore")

from bert_score.utils import bert_cos_score_idf, get_idf_dict, get_model, get_tokenizer  # noqa: E402

model, pairs, layer = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
references, candidates = pairs["references"], pairs["candidates"]
tokenizer, encoder = get_tokenizer(model), get_model(model, layer)
plain = defaultdict(lambda: 1.0, {tokenizer.sep_token_id: 0, tokenizer.cls_token_id: 0})
score = lambda count, idf: bert_cos_score_idf(
    encoder, references[:count], candidates[:count], tokenizer, idf, device="cpu", batch_size=64
)
score(4, plain)  # warms up
started = time.perf_counter()
F1 = score(len(references), get_idf_dict(references, tokenizer, nthreads=0) if "--idf" in sys.argv else plain)[:, 2]
seconds = time.perf_counter() - started
print(json.dumps({"system": "bert-score", "pairs_per_s": len(references) / seconds, "mean_f1": F1.mean().item()}))
