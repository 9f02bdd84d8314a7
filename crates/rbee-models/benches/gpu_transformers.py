"""The steps of the bench `gpu` by transformers and PyTorch on the same folders: python3 gpu_transformers.py FOLDER...

Decode has a static cache and a CUDA graph of the whole forward pass, which is what torch.compile's reduce-overhead mode makes of
it; prefill is one pass. Prints the rate of a large matrix product beside them.
"""

import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

CONTEXT, BATCHES, PROMPTS, ROUNDS = 1024, (1, 8, 64), (512, 4096), 9


def median_ms(work):
    times = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize()
        before = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times[2:])


def matrix_rate(size=8192):
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b) / 1e9


@torch.inference_mode()
def measure(folder):
    name = os.path.basename(folder.rstrip("/"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa").to("cuda").eval()
    for rows in BATCHES:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        ids = torch.full((rows, 1), 7, device="cuda")
        at = torch.tensor([CONTEXT - 1], device="cuda")

        def step():
            return model(ids, past_key_values=cache, cache_position=at, position_ids=at[None].expand(rows, 1)).logits

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        kind = "graph"
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            work = graph.replay
        except Exception as error:  # the cache of some versions cannot be recorded
            print(f"no graph: {error}", file=sys.stderr)
            kind, work = "eager", step
        print(f"| transformers {name}, {kind} | decode {rows} | {median_ms(work):.2f} ms |")
        del cache
        torch.cuda.empty_cache()
    for length in PROMPTS:
        ids = (torch.arange(length, device="cuda") * 37 % 30000)[None]
        ms = median_ms(lambda: model(ids, use_cache=True, logits_to_keep=1))
        print(f"| transformers {name} | prefill {length} | {ms:.1f} ms, {length / ms * 1e3:.0f} tokens a second |")


print(f"torch {torch.__version__}: matrix products of 8192 at {matrix_rate():.0f} TFLOP/s")
for folder in sys.argv[1:]:
    measure(folder)
