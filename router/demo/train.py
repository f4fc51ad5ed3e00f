"""Trains Quire's demo model: its tokenizer, then a small Llama, on the text of `corpus.py`.

Needs Python 3.11 or later with torch (2.9 or later), transformers, tokenizers and safetensors, and at most two hours on
2 CPU cores with 4 GiB of memory. Nothing is downloaded.

    python train.py                  # the whole run, into this directory
    python train.py --minutes 3      # a rough model, to try the script
    python train.py --start-from .   # trains the model that is there further, on text it has not seen

The learning rate falls with progress, which is the larger of steps done and time used; a run that ends by its number of
steps is therefore the same each time on the same machine. A checkpoint replaces `model.safetensors` every few minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not take the cores of others

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import corpus

HERE = Path(__file__).parent
SEED = 20
VOCAB_SIZE = 3072
TOKENS_PER_STEP = 4096
CONTEXT = 2048
MUON_RATE = 4e-3
ADAM_RATE = 4e-3
# (window length, how often): most windows are short because they are cheap, some are long so that long prompts work.
WINDOWS = [(256, 0.74), (512, 0.18), (1024, 0.06), (2048, 0.02)]
FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]

# The split of Qwen's and GPT-4's tokenizers: words with their space, single digits, runs of marks, line breaks.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train_tokenizer(num_documents: int = 40_000) -> Tokenizer:
    """Byte-level BPE: every byte has a token, each digit is one, special tokens have the ids from 0 on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, min_frequency=2, special_tokens=corpus.SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    special = re.compile("|".join(map(re.escape, corpus.SPECIAL_TOKENS)))
    stream = corpus.documents(SEED)
    texts = (special.sub("\n", corpus.text_of(next(stream))) for _ in range(num_documents))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config() -> LlamaConfig:
    """The architecture; 4.5 million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=704, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=CONTEXT, rope_theta=10000.0, rms_norm_eps=1e-5, tie_word_embeddings=True, attention_bias=False,
        mlp_bias=False, bos_token_id=None, eos_token_id=2, pad_token_id=0, use_cache=True, dtype="bfloat16")


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`."""
    replace(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    special = corpus.SPECIAL_TOKENS
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    replace(out / "tokenizer_config.json", json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, "add_bos_token": False, "bos_token": None,
        "eos_token": corpus.IM_END, "pad_token": corpus.END_OF_TEXT, "unk_token": None, "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(i): {"content": t, **flags} for i, t in enumerate(special)}, "chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
    replace(out / "generation_config.json", json.dumps({
        "do_sample": True, "temperature": 0.7, "top_p": 0.95, "eos_token_id": [special.index(corpus.IM_END), special.index(corpus.END_OF_TEXT)],
        "pad_token_id": special.index(corpus.END_OF_TEXT)}, indent=2) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_model(weights: dict[str, torch.Tensor], out: Path) -> None:
    """Writes `config.json` and `model.safetensors` (bf16), each replaced in one move."""
    model = LlamaForCausalLM(model_config())
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        for name in ("config.json", "model.safetensors"):
            os.chmod(Path(temporary) / name, 0o644)
            shutil.move(Path(temporary) / name, out / name)


def write_sums(out: Path) -> None:
    """Writes `SHA256SUMS` of what a server reads."""
    replace(out / "SHA256SUMS", "".join(f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES))


class Packer:
    """Packs documents into windows that each begin with the beginning of a document."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.stream = corpus.documents(seed)
        self.end = tokenizer.token_to_id(corpus.END_OF_TEXT)
        self.pool: list[tuple[list[int], list[bool]]] = []

    def encode(self, document: corpus.Document) -> tuple[list[int], list[bool]]:
        """Token ids of a document and whether each counts in the loss; plain text also learns where it ends."""
        ids: list[int] = []
        learned: list[bool] = []
        for text, learn in document:
            part = self.tokenizer.encode(text).ids
            ids += part
            learned += [learn] * len(part)
        return ids + [self.end], learned + [len(document) == 1 or not document[0][0].startswith(corpus.IM_START)]

    def window(self, length: int) -> tuple[list[int], list[bool]]:
        """One window: first documents that fit, in order of age; what is left over is padding."""
        while len(self.pool) < 128:
            self.pool.append(self.encode(next(self.stream)))
        ids: list[int] = []
        learned: list[bool] = []
        rest = []
        for index, (a, b) in enumerate(self.pool):
            crowded = index == 0 and sum(len(x) > length for x, _ in self.pool) > 64  # long documents wait for long windows, but not for ever
            if len(ids) + len(a) <= length or crowded:
                ids += a[:length]
                learned += b[:length]
            else:
                rest.append((a, b))
        self.pool = rest
        padding = length - len(ids)
        return ids + [self.end] * padding, learned + [False] * padding

    def batch(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`[TOKENS_PER_STEP / length, length]` ids and learned flags."""
        rows = [self.window(length) for _ in range(TOKENS_PER_STEP // length)]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


def batches(packer: Packer, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of windows of one length each."""
    generator = torch.Generator().manual_seed(seed)
    lengths, weights = zip(*WINDOWS)
    while True:
        yield packer.batch(lengths[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the learned tokens; logits are computed for these alone."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    targets = learned[:, 1:]
    logits = model.lm_head(hidden[:, :-1][targets])
    return F.cross_entropy(logits.float(), ids[:, 1:][targets])


def rate(progress: float, step: int) -> float:
    """Share of the full learning rate: a short warm-up, a plateau, then a straight fall to nothing from 45 % on."""
    return min(1.0, (step + 1) / 60, max(0.0, (1.0 - progress) / 0.55))


def train(tokenizer: Tokenizer, out: Path, steps: int, minutes: float, seed: int, start_from: Path | None) -> None:
    """Trains on the text of `seed`, from fresh weights or from those of `start_from`, and leaves the averaged weights in `out`.

    The model computes in bf16; the optimizers hold f32 copies. Matrices inside the layers use Muon (Jordan et al. 2024),
    the embedding and the norms AdamW.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config()).float().train()
    if start_from:
        model.load_state_dict(load_file(start_from / "model.safetensors"), strict=False)
        model.tie_weights()
    master = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {name: p.clone() for name, p in master.items()}
    model.to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    for tensor in master.values():
        tensor.requires_grad_(True)
    matrices = [p for n, p in master.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in master.items() if p.ndim != 2 or "embed" in n]
    optimizers = [torch.optim.Muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]
    full = [group["lr"] for o in optimizers for group in o.param_groups]
    stream = batches(Packer(tokenizer, seed), seed)
    start, shown, saved, num_tokens, losses = time.monotonic(), time.monotonic(), time.monotonic(), 0, []
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start) / 60 / minutes)
        if progress >= 1.0:
            break
        share = rate(progress, step)
        for optimizer, lr in zip(optimizers, full):
            optimizer.param_groups[0]["lr"] = lr * share
        ids, learned = next(stream)
        num_tokens += ids.numel()
        loss = loss_of(model, ids, learned)
        loss.backward()
        with torch.no_grad():
            for name, p in parameters.items():
                master[name].grad = p.grad.float()
                p.grad = None
            torch.nn.utils.clip_grad_norm_(list(master.values()), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            keep = min(0.99, step / (step + 10))
            for name, p in parameters.items():
                p.copy_(master[name])
                average[name].lerp_(master[name], 1.0 - keep)
        losses.append(loss.item())
        now = time.monotonic()
        if now - shown > 20 or step + 1 == steps:
            recent = sum(losses[-40:]) / len(losses[-40:])
            print(f"step {step + 1} progress {progress:.3f} tokens {num_tokens / 1e6:.2f} M loss {recent:.4f} "
                  f"{num_tokens / (now - start):.0f} tokens/s", flush=True)
            shown = now
        if now - saved > 240:
            write_model(average, out)
            saved = now
    write_model(average, out)
    print(f"done: {step + 1} steps, {num_tokens} tokens, {(time.monotonic() - start) / 60:.1f} minutes, loss {sum(losses[-100:]) / len(losses[-100:]):.4f}, "
          f"{sum(p.numel() for p in average.values())} parameters", flush=True)


def main() -> None:
    """Makes the whole directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--minutes", type=float, default=110.0, help="most minutes of training")
    parser.add_argument("--seed", type=int, default=SEED + 1, help="of the text and the first weights; take another one to train further")
    parser.add_argument("--start-from", type=Path, help="a directory with a model and its tokenizer to train further")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    tokenizer = Tokenizer.from_file(str(args.start_from / "tokenizer.json")) if args.start_from else train_tokenizer()
    write_tokenizer(tokenizer, args.out)
    train(tokenizer, args.out, args.steps, args.minutes, args.seed, args.start_from)
    write_sums(args.out)


if __name__ == "__main__":
    main()
