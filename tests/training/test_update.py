"""One update: two half steps that keep out of each other's way, and what stops them."""

from typing import Any

import pytest
import torch

from sd_vae.data import Batch
from sd_vae.errors import UserError
from sd_vae.losses import Objective, TilingConfig
from training import optim
from training.distributed import build_accelerator
from training.model import initial_vae, prepare_training_
from training.optim import Mover
from training.step import Geometry
from training.update import Update

GAN = {"weight": 0.5, "width": 8, "num_layers": 1}


@pytest.fixture
def make_update(make_config: Any) -> Any:
    """Return a function that builds an update, float64 where asked, of a config with changes by section."""

    def make(*, double: bool = False, adversarial: dict[str, Any] | None = None, **changes: Any) -> Update:
        from sd_vae.losses.config import AdversarialConfig

        loss = changes.pop("loss", {}) | {
            "adversarial": AdversarialConfig(**(GAN if adversarial is None else adversarial))
        }
        config = make_config(loss=loss, **changes)
        vae = initial_vae(config).train()
        vae = vae.double() if double else vae
        prepare_training_(vae, config.model)
        update = Update(build_accelerator(config), config, vae, Objective(config.loss))
        if double and update.adversary is not None:
            update.adversary.network.double()
            update.adversary.lecam.double()
        return update

    return make


def batch(num: int = 2, first: int = 0, size: int = 16, double: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(first)
    x = torch.cat([torch.rand(1, 3, size, size, generator=generator.manual_seed(first + i)) for i in range(num)])
    x = x * 2 - 1
    indices = torch.arange(first, first + num)
    return Batch(x.double() if double else x, torch.zeros_like(indices), indices, [])


def weights(update: Update) -> dict[str, torch.Tensor]:
    modules = {"vae": update.vae, "discriminator": update._adversary.network}
    return {
        f"{kind}.{name}": value.clone()
        for kind, module in modules.items()
        for name, value in module.state_dict().items()
    }


def moved(before: dict[str, torch.Tensor], update: Update, kind: str) -> bool:
    after = weights(update)
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(kind))


def test_after_each_half_step_the_other_networks_gradients_are_none(
    make_update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers' script adds the discriminator's gradients to the autoencoder's next update, and the other way round
    update, seen = make_update(), []
    movers = {id(update.mover): "vae", id(update._adversary.mover): "discriminator"}
    networks = {"vae": update.vae, "discriminator": update._adversary.network}
    move = Mover.move

    def spy(self: Mover, loss: torch.Tensor) -> Any:
        with_gradients = {
            name for name, network in networks.items() if any(p.grad is not None for p in network.parameters())
        }
        seen.append((movers[id(self)], with_gradients))
        return move(self, loss)

    monkeypatch.setattr(Mover, "move", spy)
    update([batch()], 0)

    assert seen == [("vae", {"vae"}), ("discriminator", {"discriminator"})]
    assert all(parameter.grad is None for network in networks.values() for parameter in network.parameters())


def test_both_networks_move_on_every_batch(make_update: Any) -> None:
    update = make_update(optim={"warmup_steps": 0})

    for step in range(2):
        before = weights(update)
        update([batch(first=2 * step)], step)
        assert moved(before, update, "vae")
        assert moved(before, update, "discriminator")


def test_update_logs_every_term_of_both_sides(make_update: Any) -> None:
    terms = make_update()([batch()], 0).terms

    assert list(terms) == [
        *("loss", "reconstruction", "kl", "adversarial", "adversarial_weight", "grad_norm"),
        *("disc_loss", "disc_real", "disc_fake", "disc_accuracy", "disc_grad_norm"),
    ]
    expected = terms["reconstruction"] + 1e-6 * terms["kl"] + terms["adversarial_weight"] * terms["adversarial"]
    torch.testing.assert_close(terms["loss"], expected)
    assert not any(term.requires_grad for term in terms.values())


def test_before_its_start_the_discriminator_is_left_alone(make_update: Any) -> None:
    update = make_update(adversarial=GAN | {"start_step": 1}, optim={"warmup_steps": 0})
    before = weights(update)

    early = update([batch()], 0).terms
    untouched = not moved(before, update, "discriminator")
    late = update([batch(first=2)], 1).terms

    assert untouched
    assert "adversarial" not in early
    assert "disc_loss" in late
    assert moved(before, update, "discriminator")


def test_a_fixed_weight_is_the_configs(make_update: Any) -> None:
    update = make_update(adversarial=GAN | {"adaptive": False, "weight": 0.25})

    assert update([batch()], 0).terms["adversarial_weight"] == 0.25


def test_adaptive_weight_balances_the_pulls_at_the_last_layer(make_update: Any) -> None:
    update = make_update(double=True, adversarial=GAN | {"max_adaptive": 1e9})
    x, recon, posterior, _ = update._reconstruct(batch(double=True), Geometry())
    fidelity = update.objective(x, recon, posterior).fidelity
    pulls = update._pull(fidelity, update._adversary.judge(recon))

    weight = update([batch(double=True)], 0).terms["adversarial_weight"]

    torch.testing.assert_close(weight, 0.5 * pulls[0].norm() / (pulls[1].norm() + 1e-4))


@pytest.mark.parametrize("norm", ["group", "spectral"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_four_batches_of_two_equal_one_of_eight_with_a_discriminator(
    make_update: Any, norm: str, adaptive: bool
) -> None:
    settings: dict[str, Any] = {
        "double": True,
        "adversarial": GAN | {"norm": norm, "adaptive": adaptive, "lecam_weight": 0.1},
        "optim": {"warmup_steps": 0, "schedule": "constant", "eps": 1e-3},
        "loss": {"learn_logvar": True},
    }
    # Without the discriminator's own Accelerate state both may live side by side.
    parts = make_update(gradient_accumulation_steps=4, **settings)
    for step in range(3):
        parts([batch(2, 8 * step + first, double=True) for first in (0, 2, 4, 6)], step)
    whole = make_update(**settings)
    for step in range(3):
        whole([batch(8, 8 * step, double=True)], step)

    ours, theirs = weights(parts), weights(whole)
    worst = max(float((ours[name] - value).abs().max()) for name, value in theirs.items())
    # worst seen 1e-13; a factor for each batch of its own gives 1e-4
    assert worst < 1e-10


def test_an_update_with_a_gradient_that_is_not_finite_is_not_taken(make_update: Any) -> None:
    update = make_update()
    before = weights(update)
    bad = batch()
    bad.x[0, 0, 0, 0] = float("nan")

    result = update([bad], 0)

    assert not result.is_taken
    assert all(torch.equal(before[name], value) for name, value in weights(update).items())
    assert "disc_loss" not in result.terms
    assert all(parameter.grad is None for parameter in update.vae.parameters())


def test_an_update_with_a_loss_that_is_not_finite_is_not_taken(make_update: Any) -> None:
    update = make_update()
    before = weights(update)
    for parameter in update.mover.parameters:
        parameter.grad = torch.ones_like(parameter)

    is_taken, _ = update.mover.move(torch.tensor(float("inf")))

    assert not is_taken
    assert all(torch.equal(before[name], value) for name, value in weights(update).items())


def test_a_bad_discriminator_step_is_not_taken(make_update: Any) -> None:
    adversary = make_update()._adversary
    before = {name: value.clone() for name, value in adversary.network.state_dict().items()}
    x = batch().x

    is_taken, _ = adversary.half_step([(x, x * float("nan"))])

    assert not is_taken
    assert all(torch.equal(before[name], value) for name, value in adversary.network.state_dict().items())


def test_a_skipped_update_leaves_the_schedule_where_it_is(make_update: Any) -> None:
    update = make_update(optim={"warmup_steps": 4})
    bad = batch()
    bad.x.fill_(float("nan"))

    update([bad], 0)
    update([batch()], 1)

    assert update.mover.lr == 0.0  # the first rate of the warm-up, still to be used


def test_adaptive_weight_refuses_a_last_layer_that_does_not_train(make_update: Any) -> None:
    with pytest.raises(
        UserError, match=r"adaptive is measured at decoder.conv_out, which does not train here; train it"
    ):
        make_update(model={"trainable": "parts", "parts": ("encoder",)})


def test_update_refuses_crops_too_small_for_the_discriminator(make_update: Any) -> None:
    with pytest.raises(UserError, match=r"needs images of at least 24x24 pixels, these are 16x16"):
        make_update(adversarial=GAN | {"num_layers": 3})


def test_discriminator_has_its_own_learning_rate(make_update: Any) -> None:
    update = make_update(optim={"discriminator_lr": 3e-3})

    rates = [mover.optimizer.param_groups[0]["initial_lr"] for mover in (update.mover, update._adversary.mover)]

    assert rates == [1e-3, 3e-3]


def test_learned_logvar_trains_without_weight_decay(make_update: Any) -> None:
    update = make_update(loss={"learn_logvar": True}, optim={"warmup_steps": 0, "weight_decay": 0.1})

    update([batch()], 0)

    groups = update.mover.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert update.objective.output.logvar != 0


@pytest.mark.parametrize("step", range(6))
def test_equivariance_turns_and_scales_target_and_latent_together(make_update: Any, step: int) -> None:
    from sd_vae.losses.config import EquivarianceConfig

    update = make_update(
        loss={"equivariance": EquivarianceConfig(probability=0.5, small_probability=1.0)}, adversarial={}
    )

    result = update([batch()], step)

    assert result.is_taken
    assert optim.math.isfinite(result.terms["loss"])


TILING = TilingConfig(weight=10.0, margin=1)


def test_tiling_adds_its_term_and_trains_the_decoder_by_it(make_update: Any) -> None:
    update = make_update(loss={"tiling": TILING}, adversarial={})

    terms = update([batch()], 0).terms

    assert float(terms["tiling"]) > 0
    torch.testing.assert_close(terms["loss"], terms["reconstruction"] + 1e-6 * terms["kl"] + 10.0 * terms["tiling"])


def test_tiling_brings_tiles_nearer_to_the_whole(make_update: Any) -> None:
    def seam(tiling: TilingConfig) -> float:
        update = make_update(loss={"tiling": tiling}, adversarial={}, optim={"schedule": "constant"})
        for step in range(30):
            update([batch(first=2 * step)], step)
        z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            whole, tile = update.vae.decode(z).sample, update.vae.decode(z[..., :6, :6]).sample
        return float((tile - whole[..., :12, :12]).square().mean() / whole.var())

    assert seam(TILING) < 0.7 * seam(TilingConfig())


def test_four_batches_of_two_equal_one_of_eight_with_tiles(make_update: Any) -> None:
    settings: dict[str, Any] = {
        "double": True,
        "optim": {"warmup_steps": 0, "schedule": "constant", "eps": 1e-3},
        "loss": {"tiling": TILING},
    }
    parts = make_update(gradient_accumulation_steps=4, **settings)
    parts([batch(2, first, double=True) for first in (0, 2, 4, 6)], 0)
    whole = make_update(**settings)
    whole([batch(8, 0, double=True)], 0)

    ours, theirs = weights(parts), weights(whole)
    assert max(float((ours[name] - value).abs().max()) for name, value in theirs.items()) < 1e-10


def test_update_refuses_crops_too_small_for_tiles(make_update: Any) -> None:
    with pytest.raises(UserError, match=r"loss.tiling with a margin of 4 needs latents of at least 10x10 cells, these"):
        make_update(loss={"tiling": TilingConfig(weight=1.0, margin=4)}, adversarial={})


def test_a_rehearsal_goes_through_a_tile_and_leaves_no_trace(make_update: Any) -> None:
    update = make_update(loss={"tiling": TILING})
    before = weights(update)

    update.rehearse()

    assert all(torch.equal(before[name], value) for name, value in weights(update).items())
    assert all(parameter.grad is None for parameter in update.vae.parameters())


def test_crops_of_several_sizes_train(make_update: Any) -> None:
    update = make_update(data={"size": 32, "min_size": 8}, adversarial={})
    seen = []
    update.objective.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))

    for step in range(12):
        assert update([batch(size=32)], step).is_taken

    assert len(set(seen)) > 4
    assert all(8 <= side <= 32 for side in seen)


def test_update_refuses_smallest_crops_too_small_for_the_discriminator(make_update: Any) -> None:
    with pytest.raises(UserError, match=r"needs images of at least 6x6 pixels, these are 4x4"):
        make_update(data={"min_size": 4})
