"""Steps on tensors of a GPU that is not there: no wrong device, and nothing that waits for it.

A fake tensor knows its shape, type and device but no numbers. So `.item()`, a comparison or a copy
to the CPU is an error here, and would be a wait there. Only the backward pass is left out, which
autograd runs in a thread of the GPU: gradients of the parameters' shapes stand for its own.
"""Ask no GPU for its random state, nor what it can do."""
    for place in ("vitft.training.run.seeded_state", "vitft.training.step.random_state"):
        monkeypatch.setattr(place, lambda *_: [])
    monkeypatch.setattr("vitft.training.step.set_random_state", lambda *_: None)
    monkeypatch.setattr(module, "first_varying_stage", lambda model: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)


def take_steps(folder: Path, method: str | None, **options: Any) -> None:
    """Take two steps of a run of a method, or of the whole model, on a GPU."""
    model = VisionTransformer(ViTConfig(**TINY, n_classes=2, dropout=0.1))
    if method is not None:
        adapters.inject(model, adapters.METHODS[method](), trainable=("head",))
    with FakeTensorMode():
        on_gpu(model)
        take(new_run(model, folder, options))


def new_run(model: VisionTransformer, folder: Path, options: dict[str, Any]) -> Run:
    """Return a run on a GPU."""
    plan = Plan(**{"epochs": 1, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.0} | options)
    none = Images(lambda i: torch.empty(0), torch.zeros(8, dtype=torch.long))
    none.digest = lambda: ""  # type: ignore[method-assign]
    return Run(model.train(), none, none, plan, folder)


def on_gpu(model: VisionTransformer) -> None:
    """Replace a model's tensors by fake ones of a GPU, each by one."""
    made: dict[int, torch.Tensor] = {}
    for holder in model.modules():
        for tensors in (holder._parameters, holder._buffers):
            for name, value in tensors.items():
                if value is None:
                    continue
                if id(value) not in made:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=GPU)
                    kept = isinstance(value, nn.Parameter)
                    made[id(value)] = (
                        nn.Parameter(fake, requires_grad=value.requires_grad) if kept else fake
                    )
                tensors[name] = made[id(value)]  # type: ignore[assignment]


def take(run: Run) -> None:
    """Take two steps."""
    step = Step([run], lambda models: models[0])

    def backward(loss: torch.Tensor) -> None:
        assert loss.shape == ()
        for parameter in run.trainable.values():
            parameter.grad = torch.zeros_like(parameter)

    for _ in range(2):
        images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8, device=GPU)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(torch.Tensor, "backward", backward)
            step([(images, torch.zeros(8, dtype=torch.long, device=GPU))])
    for name, parameter in run.trainable.items():
        assert parameter.device.type == "cuda", name
    assert run.totals.device.type == "cuda"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_step_of_every_method_waits_for_nothing(
    method: str | None, bf16: bool, tmp_path: Path
) -> None:
    take_steps(tmp_path, method, bf16=bf16)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon"},
        {"optimizer": "adam"},
        {"augmentation": AUGMENTATIONS[0], "label_smoothing": 0.1},
        {"augmentation": AUGMENTATIONS[1], "ema": 0.9},
        {"accumulate": 2, "clip": 0.0},
        {"checkpoint_blocks": True},
        {"layer_decay": 0.7, "auto_accumulate": True},
    ],
)
def test_no_option_of_a_plan_makes_it_wait(options: dict[str, Any], tmp_path: Path) -> None:
    take_steps(tmp_path, None, **options)


def test_what_waits_is_seen(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="item|data-dependent|DataDependent"):
        take_steps(tmp_path, None, on_nan="skip")  # which must know each step's gradient
