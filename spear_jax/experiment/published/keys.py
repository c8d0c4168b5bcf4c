"""Table of the published SPEAR code's YAML keys: how each is read, and the fields it sets.

The guide's table is generated from it.

Source: the code published with SPEAR (arXiv 2605.07977), its config dataclasses, their defaults,
    and what its functions read.
"""

from spear_jax.experiment.published.values import (
    DATASETS,
    DTYPES,
    GROUPS,
    METHODS,
    WINS,
    Key,
    aggregation,
    among,
    anything,
    at_least_one,
    classes,
    eval_split,
    fixed,
    flag,
    free,
    integer,
    kl_weight,
    last_layers,
    maybe,
    prompt_shape,
    real,
    refuse,
    reward_scale,
    samples,
    scaling,
    targets,
    temperature,
    text,
    to,
)

_ELSEWHERE = "the published code reads it nowhere"
_CACHE = "caches are set by the environment; leave it out and set"

KEYS: dict[str, Key] = {
    "output_dir": free("runs/exp", "`--workdir` names the run folder"),
    "algorithm.name": to("spear", among(*METHODS), "algorithm.name"),
    "model.model_name": to("Qwen/Qwen2.5-1.5B", text, "model"),
    "model.tokenizer_name": Key(
        None,
        maybe(text),
        lambda value, all: (
            {} if value in (None, all["model.model_name"]) else refuse("the model's own is used")
        ),
        "refused if another than the model's: a model and its tokenizer are one folder",
    ),
    "model.trust_remote_code": free(True, "no code of a model's repository is ever run"),
    "model.max_seq_len": Key(
        2048,
        integer,
        prompt_shape,
        "`data.max_prompt_tokens`: what the longest completion leaves; longer questions are "
        "refused, not cut",
    ),
    "model.dtype": Key(
        "bf16",
        among("bf16", "fp16", "fp32"),
        lambda value, _: (
            {"dtype": DTYPES[value]}
            if value in DTYPES
            else refuse("float16 is not there; take bf16")
        ),
        "`dtype`; fp16 is refused",
    ),
    "model.device_map": free(
        "auto", "JAX takes all devices; `devices.model` shares a base among several"
    ),
    "model.load_in_4bit": fixed(
        False,
        "its 4-bit format is bitsandbytes' fp4; for a 4-bit base set --config.quantize=nf4 instead",
    ),
    "model.gradient_checkpointing": Key(
        True,
        flag,
        lambda value, _: {"train.remat": "auto" if value else "nothing"},
        "`train.remat`: auto or nothing",
    ),
    "lora.r": to(16, integer, "lora.rank"),
    "lora.alpha": to(32, real, "lora.alpha"),
    "lora.dropout": to(0.05, real, "lora.dropout"),
    "lora.bias": fixed("none", "adapters have no biases here"),
    "lora.last_n_layers": Key(
        6,
        at_least_one,
        last_layers,
        "`lora.last_layers`; 0 (all) where the two published models, of 28 layers each, have no "
        "more",
    ),
    "lora.target_modules": Key([], anything, targets, "`lora.targets`; [] is all seven"),
    "data.dataset": to("arc_challenge", among(*DATASETS), "task"),
    "data.split": fixed(
        "train", "training takes the split `train`; name your own file with --config.data.path"
    ),
    "data.eval_split": Key(
        None,
        maybe(text),
        eval_split,
        "no effect where empty or `test`; for the two reasoned tasks refused otherwise",
    ),
    "data.eval_fraction": free(0.02, "all four datasets have a split to evaluate on"),
    "data.max_attempts": free(3, _ELSEWHERE),
    "data.num_clients": to(20, integer, "federation.num_clients"),
    "data.dirichlet_alpha": to(0.3, real, "federation.dirichlet_alpha"),
    "data.dirichlet_num_classes": Key(
        10,
        integer,
        classes,
        "no effect from 4 up (labels modulo it); less is refused where answers are letters",
    ),
    "data.max_examples_per_client": Key(
        500,
        maybe(integer),
        lambda value, _: {"federation.max_examples_per_client": value or 0},
        "`federation.max_examples_per_client`; null is 0, all",
    ),
    "data.seed": to(42, integer, "seed"),
    "data.eval_every": to(5, integer, "eval.every"),
    "data.eval_every_round_up_to": to(10, integer, "eval.first_rounds"),
    "fl.rounds": to(20, integer, "rounds"),
    "fl.clients_per_round": Key(
        5,
        integer,
        lambda value, all: {"federation.clients_per_round": min(value, all["data.num_clients"])},
        "`federation.clients_per_round`, at most all clients",
    ),
    "fl.local_train_steps": to(50, at_least_one, "train.steps"),
    "fl.local_rollout_steps": to(
        25, at_least_one, "rollout.examples", note="of grpo without effect, there and here"
    ),
    "fl.aggregation": Key(
        "fedavg",
        among("fedavg", "fedadam", "fedyogi"),
        aggregation,
        "`federation.aggregation`; fedadam and fedyogi with its server's constants "
        "(`server_rate` 0.01, `beta1` 0.9, "
        "`beta2` 0.99, `tau` 0.005). With `,reference` fedavg is `last`, the others are refused",
    ),
    "fl.fedprox_mu": fixed(
        0.0, f"{_ELSEWHERE}; set it to 0, and --config.federation.prox for FedProx"
    ),
    "gen.max_new_tokens_y0": to(
        256, integer, "rollout.max_new_tokens", "eval.max_new_tokens", "data.max_response_tokens"
    ),
    "gen.max_new_tokens_y1": to(256, integer, "rollout.max_new_tokens_revision"),
    "gen.num_revisions": to(
        1, at_least_one, "rollout.num_revisions", note="rltf_sd revises once, there and here"
    ),
    "gen.do_sample": Key(
        False,
        flag,
        lambda *_: {},
        "false: `rollout.temperature` 0 (greedy); grpo and rltf_sd always sample",
    ),
    "gen.temperature": Key(
        0.7, real, temperature, "`rollout.temperature`; of grpo and rltf_sd at least 0.7, as there"
    ),
    "gen.top_p": to(0.95, real, "rollout.top_p"),
    "gen.rollout_batch_size": to(
        8, at_least_one, "rollout.max_concurrent_sequences", note="speed and memory only"
    ),
    "gen.eval_batch_size": to(8, at_least_one, "eval.rows", note="speed and memory only"),
    "spear.lambda_win": Key(
        1.0,
        real,
        lambda value, all: {f"{all['algorithm.name']}.win_weight": value},
        "`METHOD.win_weight`",
        WINS,
    ),
    "spear.lambda_lose": to(0.3, real, "spear.lose_weight", methods=("spear",)),
    "spear.lambda_anchor": to(0.01, real, "train.anchor_weight", methods=WINS),
    "spear.unlikelihood_margin": to(0.1, real, "spear.margin", methods=("spear",)),
    "spear.ema_decay": to(0.0, real, "train.ema_decay", methods=WINS),
    "spear.ul_answer_only": Key(
        False,
        flag,
        lambda value, all: {
            "spear.answer_only": "always"
            if value and all["data.dataset"] != "strategy_qa"
            else "never"
        },
        "`spear.answer_only`: always or never; of strategy_qa never, as there",
        ("spear",),
    ),
    "spear.ul_tail_tokens": to(0, integer, "spear.tail", methods=("spear",)),
    "spear.ul_skip_math_ops": to(False, flag, "spear.skip_math_ops", methods=("spear",)),
    "spear.max_lose_ratio": to(2.0, real, "spear.max_lose_ratio", methods=("spear",)),
    "grpo.num_generations": Key(4, integer, samples, "`grpo.group`, `rltf_sd.samples`", GROUPS),
    "grpo.beta_kl": Key(0.02, real, kl_weight, "`grpo.kl_weight`, `rltf_sd.kl_weight`", GROUPS),
    "grpo.clip_range": to(0.2, real, "grpo.clip_low", "grpo.clip_high", methods=("grpo",)),
    "grpo.normalize_advantage": Key(
        True, flag, scaling, "`grpo.scaling`: group (std with `,reference`), or none", ("grpo",)
    ),
    "grpo.reward_scale": Key(
        1.0,
        real,
        reward_scale,
        "`grpo.reward_scale`; of rltf_sd refused if not 1, since its rewards are 0 and 1",
        GROUPS,
    ),
    "grpo.reward_clip": Key(
        None,
        maybe(real),
        lambda *_: {},
        "`grpo.reward_scale` is the lower of both: rewards are 0 or the scale",
        ("grpo",),
    ),
    "rltf_sd.gamma": to(1.0, real, "rltf_sd.discount", methods=("rltf_sd",)),
    "rltf_sd.sd_coeff": to(0.1, real, "rltf_sd.sd_weight", methods=("rltf_sd",)),
    "rltf_sd.rl_coeff": to(1.0, real, "rltf_sd.rl_weight", methods=("rltf_sd",)),
    "rltf_sd.early_termination": fixed(
        True, "a conversation that was right at once ends here", ("rltf_sd",)
    ),
    "distill.temperature": Key(
        2.0,
        real,
        lambda value, _: {"opsd.temperature": value, "opsd.divergence": "forward_kl"},
        "`opsd.temperature`, with `opsd.divergence=forward_kl`, the divergence whose temperature "
        "it is",
        ("opsd",),
    ),
    "distill.kl_weight": free(1.0, _ELSEWHERE),
    "distill.anchor_weight": free(0.0, _ELSEWHERE),
    "distill.priv_max_chars": fixed(
        2000, "a teacher's privileged text has at most 2000 characters here", ("opsd",)
    ),
    "distill.feedback_max_chars": free(800, "feedback is not cut here"),
    "distill.num_demos": free(1, _ELSEWHERE),
    "distill.demo_max_chars": free(1800, _ELSEWHERE),
    "optim.lr": to(2e-4, real, "train.learning_rate"),
    "optim.weight_decay": to(1e-3, real, "train.weight_decay"),
    "optim.batch_size": to(1, at_least_one, "train.batch_size"),
    "optim.grad_accum_steps": to(4, at_least_one, "train.accumulation"),
    "optim.max_grad_norm": to(1.0, real, "train.max_grad_norm"),
    "optim.warmup_ratio": to(0.1, real, "train.warmup_ratio"),
    "optim.lr_min": to(1e-5, real, "train.learning_rate_min"),
    "optim.use_warmup": to(False, flag, "train.warmup"),
    "optim.micro_batch_size": free(
        None, "`train.max_tokens_per_block` bounds the memory of a step"
    ),
    "feedback.provider": fixed(
        "oracle", "it knows no other; set --config.rollout.feedback for none or human"
    ),
    "feedback.mc_hint_words": to(3, integer, "rollout.hint_words"),
    "hf.offline": fixed(False, "leave it out and give `--offline` to the command"),
    "hf.hf_home": fixed(None, f"{_CACHE} HF_HOME"),
    "hf.model_cache_dir": fixed(None, f"{_CACHE} HF_HUB_CACHE"),
    "hf.dataset_cache_dir": fixed(None, f"{_CACHE} HF_DATASETS_CACHE"),
    "hf.hub_cache_dir": fixed(None, f"{_CACHE} HF_HUB_CACHE"),
}
