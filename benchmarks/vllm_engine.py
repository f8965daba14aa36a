"""vLLM's side of benchmarks/engine.py: greedy batches on request, one JSON line each way. Runs in vLLM's own environment.

Standard input: {"prompts": [[token id, …], …], "count": n}. Standard output: `answer ` and {"seconds": s, "tokens": [[…], …]}.
"""

import json
import sys
import time
from typing import Any


def main() -> None:
    """Load the directory named by the first argument, say so, then answer until the input ends."""
    from vllm import LLM, SamplingParams

    engine: Any = LLM(
        model=sys.argv[1],
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,  # the others are measured without theirs
        disable_log_stats=True,
        skip_tokenizer_init=False,
    )
    answer("ready")
    for line in sys.stdin:
        asked = json.loads(line)
        rows = [{"prompt_token_ids": row} for row in asked["prompts"]]
        sampling = SamplingParams(temperature=0.0, max_tokens=asked["count"], ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        found = engine.generate(rows, sampling, use_tqdm=False)
        answer({"seconds": time.perf_counter() - began, "tokens": [list(each.outputs[0].token_ids) for each in found]})


def answer(value: Any) -> None:
    """One line that the reader recognises among vLLM's own messages."""
    print("answer " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
