"""Makes the embedded tiny model again, from scratch.

A small Llama is trained on completions of the embedded tasks' own prompts, minutes on a CPU. It
learns to read the prompt format, to answer in it, and to use a hint in a revision prompt. It learns
what the *old* traders sell, and which kind each ware is of. A *new* trader's ware is drawn at
random every time it comes up, so there is nothing to know: that is left to federated training.
"""

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import tokenizers
import transformers

from spear_jax.core.errors import UserError
from spear_jax.core.types import Example
from spear_jax.experiment import command_line
from spear_jax.feedback.base import Request
from spear_jax.feedback.registry import get_feedback
from spear_jax.models.config import ModelConfig, parse_config
from spear_jax.models.decoder import Decoder, logits
from spear_jax.models.io.huggingface import load_model, save_model
from spear_jax.models.lora import LoraConfig, projection_shapes
from spear_jax.models.params import DecoderParams, LayerParams
from spear_jax.tasks import facts, reasoned, world
from spear_jax.tasks.base import Task

EOS, PAD = "<|end|>", "<|pad|>"
RAW_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
Text = tuple[str, str]  # prompt with header, completion


class Corpus:
    """Endless training rows of one task, by purpose."""

    def __init__(self, task: Task, seed: int):
        self.task, self.rng = task, random.Random(f"{task.name}/{seed}")
        self.oracle = get_feedback("oracle", task, hint_words=3)

    def draw(self, name: str, ware: str) -> Example:
        """Draws an example about a trader and a ware."""
        rng = self.rng
        if isinstance(self.task, facts.Facts):
            return facts.make_example("", rng.choice(world.PHRASINGS).format(name=name), ware, rng)
        return reasoned.make_example(
            "", rng.choice(reasoned.ALL_PHRASINGS), name, ware, rng.random() < 0.5, rng
        )

    def right(self, example: Example) -> str:
        """Returns the completion that is right."""
        if isinstance(self.task, facts.Facts):
            return f" {example.labels[example.gold]}"
        return reasoned.solution(example)

    def wrong(self, example: Example) -> str:
        """Draws a completion that is wrong."""
        rng = self.rng
        if isinstance(self.task, facts.Facts):
            return f" {rng.choice([x for i, x in enumerate(example.labels) if i != example.gold])}"
        name = example.support[0].split()[0]
        ware = rng.choice(world.WARES)
        label = example.labels[1 - example.gold]
        return f" {name} sells {ware}. That is a kind of {world.KIND_OF[ware]}. Answer: {label}"

    def lookup(self) -> Text:
        """Draws four options, then every ware followed by its letter.

        It is the plainest form of reading options.
        """
        example = self.draw("", self.rng.choice(world.WARES))
        order = self.rng.sample(range(4), 4)
        options = "\n".join(
            f"{a}. {b}" for a, b in zip(example.labels, example.options, strict=True)
        )
        answer = "".join(f" {example.options[i]} {example.labels[i]}" for i in order)
        return f"{options}\n{self.task.templates.header}", answer

    def direct(self) -> Text:
        """Draws a question that names the ware or its kind, or the hint alone before the options."""
        ware, header = self.rng.choice(world.WARES), self.task.templates.header
        asked = self.rng.choice((ware, f"a kind of {world.KIND_OF[ware]}"))
        example = facts.make_example("", f"Which of these is {asked}?", ware, self.rng)
        text = self.task.question(example)
        if self.rng.random() < 0.25:
            text = f"{self.task.hint(example, 3)}\n{text.partition(chr(10))[2]}"
        return f"{text}\n{header}", self.right(example)

    def question(self, old: bool) -> Text:
        """Draws a first question about an old trader, or about a new one with a random ware."""
        name = self.rng.choice(world.OLD_TRADERS if old else world.NEW_TRADERS)
        example = self.draw(name, world.WARE_OF[name] if old else self.rng.choice(world.WARES))
        return f"{self.task.question(example)}\n{self.task.templates.header}", self.right(example)

    def revision(self) -> Text:
        """Draws a revision after feedback, mostly about a new trader.

        Its ware is drawn at random, so that the hint is needed.
        """
        old = self.rng.random() < 0.2
        name = self.rng.choice(world.OLD_TRADERS if old else world.NEW_TRADERS)
        example = self.draw(name, world.WARE_OF[name] if old else self.rng.choice(world.WARES))
        wrong = self.wrong(example).strip()
        said = self.oracle([Request(example=example, answer=wrong, attempt=1)])[0]
        return (
            f"{self.task.revision(example, wrong, said)}\n{self.task.templates.header}",
            self.right(example),
        )


def build_tokenizer(
    corpora: list[Corpus], rows: int = 6000, vocab: int = 2048
) -> tokenizers.Tokenizer:
    """Builds a byte-level BPE from the tasks' own text; names and wares become single tokens."""
    texts = []
    for corpus in corpora:
        for index in range(rows):
            texts.append(
                "".join(
                    corpus.revision() if index % 4 == 0 else corpus.question(old=index % 2 == 0)
                )
            )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def init_base(key: jax.Array, model: ModelConfig) -> DecoderParams:
    """Draws random float32 weights: normal with deviation 1/sqrt(inputs).

    Outputs into the residual stream are shrunk by sqrt(2 L). Embeddings of deviation 0.3 keep a
    token's identity above what the first layers add to it. A final norm of 0.2 keeps the tied
    head's first logits small. With deviation 0.02 throughout, reading options was not learnt.
    """
    layers = {
        "attn_norm": jnp.ones((model.layers, model.width)),
        "mlp_norm": jnp.ones((model.layers, model.width)),
    }
    for index, (name, (inputs, outputs)) in enumerate(projection_shapes(model).items()):
        scale = inputs**-0.5 / ((2 * model.layers) ** 0.5 if name in ("o", "down") else 1.0)
        layers[name] = scale * jax.random.normal(
            jax.random.fold_in(key, index), (model.layers, inputs, outputs)
        )
    embed = 0.3 * jax.random.normal(jax.random.fold_in(key, 99), (model.vocab_size, model.width))
    return DecoderParams(embed=embed, layers=LayerParams(**layers), norm=jnp.full(model.width, 0.2))


class Group:
    """Rows of one purpose in a batch of fixed shape.

    Args:
        source: draws a text.
        size: rows in a training batch.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: Callable[[], Text], size: int):
        self.tokenizer, self.source, self.size = tokenizer, source, size
        drawn = [self._encode() for _ in range(300)]
        self.prompt = 8 + max(len(prompt) for prompt, _ in drawn)
        self.length = 2 + max(len(completion) for _, completion in drawn)

    def _encode(self) -> tuple[list[int], list[int]]:
        prompt, completion = self.source()
        eos = self.tokenizer.token_to_id(EOS)
        return self.tokenizer.encode(prompt).ids, [*self.tokenizer.encode(completion).ids, eos]

    def batch(self, size: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws a batch: token ids, the mask of real ones, and the mask of completions.

        Prompts end at one column, and completions begin there. Of [5, 6] with [8, EOS] and [7] with
        [9, 4, EOS], EOS = 0 and PAD = 1:

            tokens   5 6 8 0 1    mask   1 1 1 1 0    scored   0 0 1 1 0
                     1 7 9 4 0           0 1 1 1 1             0 0 1 1 1

        Returns: int32[B, T]; bool[B, T] each.
        """
        size = size or self.size
        tokens = np.full(
            (size, self.prompt + self.length), self.tokenizer.token_to_id(PAD), np.int32
        )
        mask, scored = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
        for row in range(size):
            prompt, completion = self._encode()
            while len(prompt) > self.prompt or len(completion) > self.length:
                prompt, completion = self._encode()
            tokens[row, self.prompt - len(prompt) : self.prompt] = prompt
            tokens[row, self.prompt : self.prompt + len(completion)] = completion
            mask[row, self.prompt - len(prompt) : self.prompt + len(completion)] = True
            scored[row, self.prompt : self.prompt + len(completion)] = True
        return tokens, mask, scored


def make_groups(tokenizer: tokenizers.Tokenizer, corpora: list[Corpus]) -> tuple[dict, dict]:
    """Makes the rows of both stages, and the rows that progress is measured on."""
    fact, reason = corpora
    make = functools.partial(Group, tokenizer)
    copying = {"lookup": make(fact.lookup, 32), "direct": make(fact.direct, 32)}
    tasks = {
        "direct": make(fact.direct, 16),
        "old facts": make(functools.partial(fact.question, old=True), 40),
        "new facts": make(functools.partial(fact.question, old=False), 5),
        "fact revisions": make(fact.revision, 24),
        "old reasons": make(functools.partial(reason.question, old=True), 12),
        "new reasons": make(functools.partial(reason.question, old=False), 2),
        "reason revisions": make(reason.revision, 6),
    }
    return copying, tasks


def train(
    config: ml_collections.ConfigDict, decoder: Decoder, copying: dict, tasks: dict
) -> DecoderParams:
    """Trains all parameters with AdamW on completion tokens.

    It prints a line of accuracies every `log_every` steps.

    Returns: the base.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.rate, WARMUP, config.steps, 0.05 * config.rate
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    base = load_model(config.start_from, "float32").base if config.start_from else None
    base = base or init_base(jax.random.key(config.seed), decoder.config)
    state = optimiser.init(base)
    score = jax.jit(functools.partial(logprobs, decoder))

    def objective(base, batches):
        total, count = 0.0, 0.0
        for batch in batches:
            total -= logprobs(decoder, base, batch).sum()
            count += batch[2].sum()
        return total / count

    @jax.jit
    def step(base, state, batches):
        loss, grads = jax.value_and_grad(objective)(base, batches)
        updates, state = optimiser.update(grads, state, base)
        return optax.apply_updates(base, updates), state, loss

    began = time.time()
    for index in range(1, config.steps + 1):
        groups = copying if index <= config.copy_steps else tasks
        base, state, loss = step(base, state, [group.batch() for group in groups.values()])
        if index % config.log_every == 0:
            right = {name: accuracy(score, base, group) for name, group in groups.items()}
            shown = "  ".join(f"{name} {value:.2f}" for name, value in right.items())
            left = (time.time() - began) / index * (config.steps - index)
            print(
                f"step {index}/{config.steps}  loss {float(loss):.3f}  {shown}  ({left:.0f} s "
                f"left)",
                flush=True,
            )
    return base


def logprobs(decoder: Decoder, base: DecoderParams, batch: tuple) -> jax.Array:
    """Returns float32[B, T - 1]: log p of each completion token, 0 elsewhere.

    It takes full logits, which a small vocabulary allows.
    """
    tokens, mask, scored = batch
    whole = jax.nn.log_softmax(logits(decoder, None, base, tokens, mask)[:, :-1])
    picked = jnp.take_along_axis(whole, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(scored[:, 1:], picked, 0.0)


def accuracy(score, base: DecoderParams, group: Group, size: int = 128) -> float:
    """Returns the fraction of rows whose trained tokens have more than half of the probability."""
    batch = group.batch(size)
    return float((np.asarray(score(base, batch)).sum(-1) > np.log(0.5)).mean())


WARMUP = 100  # steps in which the learning rate rises

EXAMPLES = """
    python -m spear_jax.pretrain --config=pretrain --out=models/tiny
    python -m spear_jax.pretrain --config=pretrain --config.steps=200 --out=models/try
"""


def recipe(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the model that the package carries, locked. It takes no argument."""
    if arg:
        raise UserError(f"the config 'pretrain' takes no argument, got {arg!r}; leave it out.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.width = 128  # model width; heads are 32 wide
    config.layers = 4
    config.vocab_size = 2048  # upper bound of the tokenizer's size
    config.rate = 2e-3  # peak learning rate, cosine decay after WARMUP steps
    config.copy_steps = 600  # steps on looking options up, before the tasks come in
    config.steps = 2000  # all steps
    config.start_from = ""  # a folder of an earlier pretraining to go on from
    config.log_every = 100
    return config.lock()


def main(argv: list[str]) -> dict[str, Any]:
    parser = command_line.parser("pretrain", __doc__, EXAMPLES)
    parser.add_argument("--out", required=True, help="the model folder to write")
    args, rest = parser.parse_known_args(argv)
    config = command_line.read_config(rest, default="pretrain", named={"pretrain": recipe})
    if config.steps <= WARMUP:
        raise UserError(
            f"steps is {config.steps}; it must exceed the {WARMUP} steps in which the learning rate "
            f"rises. Set --config.steps."
        )
    return pretrain(config, args.out)


def pretrain(config: ml_collections.ConfigDict, out: str) -> dict[str, Any]:
    """Trains and writes the model folder; returns a summary."""
    began = time.time()
    corpora = [Corpus(facts.Facts(), config.seed), Corpus(reasoned.Reasoned(), config.seed)]
    if config.start_from:
        tokenizer = tokenizers.Tokenizer.from_file(f"{config.start_from}/tokenizer.json")
    else:
        tokenizer = build_tokenizer(corpora, vocab=config.vocab_size)
    raw = {
        **RAW_CONFIG,
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.width // 32,
        "num_key_value_heads": config.width // 64,
        "intermediate_size": 3 * config.width,
    }
    decoder = Decoder(parse_config(raw), LoraConfig(1, 1.0, 0.0, ("q",)))
    copying, tasks = make_groups(tokenizer, corpora)
    base = train(config, decoder, copying, tasks)
    score = jax.jit(functools.partial(logprobs, decoder))
    final = {name: accuracy(score, base, group, 512) for name, group in tasks.items()}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD
    )
    save_model(out, jax.tree.map(lambda x: np.asarray(x, np.float16), base), raw, fast)
    return {
        "out": out,
        "parameters": sum(x.size for x in jax.tree.leaves(base)),
        "accuracy": final,
        "seconds": round(time.time() - began, 1),
    }


if __name__ == "__main__":
    command_line.run(main)
