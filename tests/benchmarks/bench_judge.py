"""Throughput of the judges: one by one as published, batched, and batched with the cache, on one small HF model.

    python tests/benchmarks/bench_judge.py [--cases 6] [--candidates 8]

The model is a random Llama of 6 layers, so its answers say nothing; its work is that of a judge: prompts of some
600 tokens, greedy answers of a fixed length. The workload is that of preference data: candidates for each case,
some of which are the same text, judged once for the pairs and once again for the evaluation. CPU time is given
too: other work on the machine disturbs it less.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mu2llm.green import load_judge
from mu2llm.green.judge import Judge, Pair
from mu2llm.green.prompt import TEMPLATE
from mu2llm.settings.green import JudgeConfig

SENTENCES = [
    f"{size} {side} {finding}."
    for size in ("Small", "Moderate", "Large", "12 mm", "3 cm")
    for side in ("left", "right", "bilateral")
    for finding in ("pleural effusion", "nodule in the upper lobe", "consolidation of the lower lobe", "renal cyst")
]


def make_model(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEMPLATE, *SENTENCES], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_pairs(cases: int, candidates: int, rng: random.Random) -> list[Pair]:
    """Candidates of 1 to 6 sentences; one in four is what another candidate of its case says."""
    pairs: list[Pair] = []
    for _ in range(cases):
        reference = " ".join(rng.sample(SENTENCES, 5))
        made: list[str] = []
        for _ in range(candidates):
            again = made and rng.random() < 0.25
            made.append(rng.choice(made) if again else " ".join(rng.sample(SENTENCES, rng.randint(1, 6))))
        pairs += [(reference, candidate) for candidate in made]
    return pairs


def one_by_one(judge: Judge) -> Callable[[Sequence[Pair]], None]:
    def run(pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            judge.judge([pair])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160, help="length of an answer")
    arguments = parser.parse_args()
    pairs = make_pairs(arguments.cases, arguments.candidates, random.Random(0))
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model")
        plain = JudgeConfig(name=f"hf:{folder}/model", batch_size=1, max_new_tokens=arguments.tokens)
        batched = plain.model_copy(update={"batch_size": 16})
        cached = batched.model_copy(update={"cache": f"{folder}/cache"})
        rows = [
            ("one by one", one_by_one(load_judge(plain)), 2),
            ("batched", load_judge(batched).judge, 2),
            ("batched + cached", load_judge(cached).judge, 2),
            ("rules", load_judge(JudgeConfig(name="rules")).judge, 2),
        ]
        different = len(set(pairs))
        print(f"{len(pairs)} pairs ({different} different), each judged twice; {torch.get_num_threads()} threads")
        print(f"{'judge':18} {'seconds':>9} {'pairs/s':>9} {'speed-up':>9} {'CPU s':>9} {'speed-up':>9}")
        base = cpu_base = 0.0
        for name, run, times in rows:
            run(pairs[:1])  # not counted: compiling, the lexicon
            start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(times):
                run(pairs)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            base, cpu_base = base or seconds, cpu_base or cpu
            rate = f"{times * len(pairs) / seconds:9.1f} {base / seconds:8.1f}x"
            print(f"{name:18} {seconds:9.2f} {rate} {cpu:9.2f} {cpu_base / cpu:8.1f}x", flush=True)


if __name__ == "__main__":
    main()
