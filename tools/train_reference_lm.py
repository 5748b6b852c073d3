"""Train a model like the embedded one from the sources of CPython's own standard library.

    python tools/train_reference_lm.py OUT --minutes 80

Reads nothing but the running interpreter's library (CPython 3.11 for the published model; other versions hold other
files). Writes to OUT what `AutoModelForCausalLM` and `AutoTokenizer` load offline, in bfloat16, and `heldout.txt`.
Needs the extra `fibkv[hf]`. The published model took 80 minutes on 2 CPU cores; a run is bounded by time, not by
steps, so figures differ from machine to machine.

Text       library files of 400 to 400,000 characters in UTF-8, without third-party packages, generated tables and
           test data of scripts other than source code (EXCLUDED).
Held out   every file whose relative path has a SHA-256 that 25 divides; never trained on, the tokenizer included.
           heldout.txt holds six of them (HELDOUT_FILES).
Sequences  65 % plain windows of the text, 35 % recall prompts (`fibkv.needle`) with 3 to 14 planted values.
Model      Llama: 4 layers, hidden 256, MLP 704, 4 query and 2 KV heads of 64, RoPE theta 10000, tied embeddings,
           byte-level BPE of 2048 tokens; 3.5 M parameters.
Optimizer  AdamW (0.9, 0.95), weight decay 0.1 on matrices, learning rate 3e-3 with 100 warm-up steps and a cosine
           down to 3 % at the end of the time, gradient clip 1.0, bfloat16 autocast.
Lengths    batches of 16 x 384 tokens for 70 % of the time, 6 x 1024 for 22 %, 3 x 2048 for the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import re
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fibkv.needle import draw_needles, plant

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
MAX_POSITIONS = 4096
RECALL_SHARE = 0.35
EXCLUDED = re.compile(
    r"(site-packages|idlelib|lib2to3|encodings|pydoc_data)/"
    r"|test/test_(unicode\w*|ucn|codecencodings_\w+|codecmaps_\w+)\.py$"
)
HELDOUT_FILES = (
    "functools.py",
    "asyncio/events.py",
    "_pyio.py",
    "graphlib.py",
    "zipimport.py",
    "xml/dom/pulldom.py",
)
# (share of the time at which the stage ends, sequences per batch, tokens per sequence)
STAGES = ((0.70, 16, 384), (0.92, 6, 1024), (1.00, 3, 2048))
PEAK_RATE, FINAL_SHARE, WARMUP_STEPS = 3e-3, 0.03, 100


def library_sources(library: Path) -> Iterator[tuple[str, str]]:
    """(path relative to the library, text) of every file that passes the filters, in the order of the paths."""
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library).as_posix()
        if EXCLUDED.search(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if 400 <= len(text) <= 400_000:
            yield relative, text


def is_held_out(relative: str) -> bool:
    """Whether the file at this relative path is never trained on."""
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 25 == 0


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens; `END_OF_TEXT` is id 0 and the only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )


def build_model() -> LlamaForCausalLM:
    """A new model with random weights, float32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


class Sequences:
    """Draws training sequences from one text, which is held as token ids with the characters of each token."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        ids: list[int] = []
        for text in texts:
            ids += [0, *tokenizer(text, verbose=False).input_ids]
        self._ids = torch.tensor(ids, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self._ids)

    def plain(self, length: int) -> Tensor:
        """A window of the text, int64 [length]."""
        start = self._rng.randrange(len(self._ids) - length)
        return self._ids[start : start + length].long()

    def recall(self, length: int) -> Tensor:
        """A recall prompt with a stretch of the text as filler, int64 [length].

        The filler is a little too short, because tokens at the seams with the planted lines may split; more of the
        text goes before it, so that the questions end the sequence.
        """
        wanted = self._rng.randint(3, 14)
        needles = draw_needles(self._rng, wanted, filler="")
        around = plant(self._rng, needles, filler="").text
        filler_ids = self.plain(max(1, length - len(self._tokenizer(around).input_ids) - 16))
        filler = self._tokenizer.decode(filler_ids, skip_special_tokens=True)
        prompt = plant(self._rng, needles, filler=filler)
        ids = torch.tensor(self._tokenizer(prompt.text).input_ids, dtype=torch.int64)[-length:]
        return torch.cat([self.plain(length - len(ids)), ids])

    def batch(self, num_sequences: int, length: int) -> Tensor:
        """Plain windows and recall prompts in the stated shares, int64 [num_sequences, length]."""
        kinds = [self.recall if self._rng.random() < RECALL_SHARE else self.plain for _ in range(num_sequences)]
        return torch.stack([draw(length) for draw in kinds])


def learning_rate(step: int, progress: float) -> float:
    """Warm-up over the first steps, times a cosine from 1 to `FINAL_SHARE` over ``progress`` 0 to 1."""
    cosine = FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def stage_shape(progress: float) -> tuple[int, int]:
    """(sequences, tokens) of a batch at ``progress`` of the time, at least 0 and below 1."""
    return next((rows, tokens) for end, rows, tokens in STAGES if progress < end)


def train(
    model: LlamaForCausalLM, sequences: Sequences, minutes: float, report: Callable[[int, float, float], None]
) -> None:
    """Train in place until the time is up; ``report(step, progress, loss)`` is called at every step."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))
    model.train()
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        ids = sequences.batch(*stage_shape(progress))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step, progress, loss.item())
        step += 1
    model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model like the embedded one.")
    parser.add_argument("out", type=Path, help="directory to write the model to")
    parser.add_argument("--minutes", type=float, default=80.0, help="time to train for (default: 80)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences (default: 0)")
    arguments = parser.parse_args()

    sources = dict(library_sources(Path(sysconfig.get_path("stdlib"))))
    texts = [text for relative, text in sources.items() if not is_held_out(relative)]
    print(f"{len(texts)} files to train on, {sum(map(len, texts)) / 1e6:.1f} million characters", flush=True)
    tokenizer = train_tokenizer(texts)
    sequences = Sequences(tokenizer, texts, random.Random(arguments.seed))
    print(f"{len(sequences) / 1e6:.1f} million tokens", flush=True)
    torch.manual_seed(arguments.seed)
    model = build_model()

    def report(step: int, progress: float, loss: float) -> None:
        if step % 10 == 0:
            print(f"step {step:6d}  {progress:6.1%}  loss {loss:.3f}", flush=True)

    train(model, sequences, arguments.minutes, report)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    held_out = "\n".join(sources[name] for name in HELDOUT_FILES if name in sources and is_held_out(name))
    (arguments.out / "heldout.txt").write_text(held_out, encoding="utf-8")


if __name__ == "__main__":
    main()
