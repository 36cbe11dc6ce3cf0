"""Recipes: strict, forgiving in nothing, helpful in everything."""

from pathlib import Path
from typing import Any

import pytest

from sd_vae.errors import UserError
from training.config import REQUIRED, ModelConfig, OptimConfig, load_recipe, save_recipe

SHIPPED = [
    *("beta", "demo", "domain_adapt_lora", "eq_vae", "finetune_decoder", "finetune_ema"),
    *("from_scratch", "from_scratch_512", "ldm_kl_f8", "mini", "mini_lpips"),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_load_recipe_reads_every_shipped_recipe_by_name(name: str) -> None:
    config = load_recipe(name)

    assert config.out == REQUIRED
    assert config.data.train == REQUIRED


def test_shipped_recipes_are_the_ones_tested() -> None:
    folder = Path(__file__).parents[2] / "training" / "recipes"

    assert sorted(path.stem for path in folder.glob("*.yaml")) == SHIPPED


def test_save_recipe_is_read_back_equal(tmp_path: Path, make_config: Any) -> None:
    config = make_config()

    save_recipe(config, tmp_path / "recipe.yaml")

    assert load_recipe(tmp_path / "recipe.yaml") == config


def test_load_recipe_reads_exponents_without_a_point(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "steps: 1\nbatch_size: 1\noptim: {lr: 1e-6}\n")

    assert load_recipe(path).optim.lr == 1e-6


def test_load_recipe_names_all_problems_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "steps: many\nbatch_size: 1\noptim: {lrr: 1}\nloss: {kl: {weigth: 1}}\n")

    with pytest.raises(UserError) as caught:
        load_recipe(path)

    message = str(caught.value)
    assert "steps is 'many'" in message
    assert "unknown key 'optim.lrr', did you mean 'lr'?" in message
    assert "unknown key 'loss.kl.weigth', did you mean 'weight'?" in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "holds list, a recipe is a mapping"),
        ("steps: 0\nbatch_size: -1\nseed: -1", "steps is 0.*batch_size is -1.*seed is -1"),
        ("steps: 1\nbatch_size: 1\nema_decay: 1.0", "ema_decay is 1.0"),
        ("steps: true\nbatch_size: 1", "steps is True"),
        ("batch_size: 1", "steps is missing"),
        ("steps: 1\nbatch_size: 1\ndata: 3", "data is 3"),
    ],
)
def test_load_recipe_rejects(tmp_path: Path, text: str, match: str) -> None:
    path = write(tmp_path / "r.yaml", text)

    with pytest.raises(UserError, match=match):
        load_recipe(path)


def test_load_recipe_lists_the_shipped_ones_when_there_is_no_such_file() -> None:
    with pytest.raises(UserError, match="there is no recipe nothing; give a YAML file or one of: beta, demo, domain"):
        load_recipe("nothing")


def test_require_complete_names_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"out and data.train must be given; .* --out VALUE and --data.train VALUE"):
        load_recipe("from_scratch").require_complete()
    with pytest.raises(UserError, match=r"data.train and model.pretrained must be given"):
        load_recipe("from_scratch_512").require_complete()


def test_model_config_rejects_an_unknown_preset() -> None:
    with pytest.raises(UserError, match=r"model.preset is 'sd9', choose one of: sd1"):
        ModelConfig(preset="sd9")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"trainable": "parts"}, r"model.trainable is parts and model.parts \[\]; name parts with"),
        ({"parts": ("decoder",)}, r"model.trainable is all and model.parts \['decoder'\]"),
        ({"lora_rank": 0, "lora_alpha": 0.0}, r"model.lora_rank is 0, .*; model.lora_alpha is 0.0"),
    ],
)
def test_model_config_rejects(fields: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        ModelConfig(**fields)


def test_optim_config_lists_every_value_out_of_range() -> None:
    with pytest.raises(UserError, match=r"optim.lr is 0.*optim.eps is 0.*optim.betas.*optim.weight_decay is -1"):
        OptimConfig(lr=0.0, betas=(0.9, 1.0), weight_decay=-1.0, eps=0.0)


def test_load_recipe_prefers_a_shipped_recipe_to_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)

    assert load_recipe("demo").model.pretrained == "mini"


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_optim_config_refuses_what_is_not_finite(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"optim.{name} is {value}, it must be a finite number"):
        OptimConfig(**{name: value})
