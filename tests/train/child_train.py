"""A training job for the subprocess tests: `python child_train.py OUT [key=value ...]`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_training import digits, jitter, tiny_net

from featherweight.train.loop import fit_model
from featherweight.train.recipe import Recipe


def main() -> None:
    out, options = sys.argv[1], dict(item.split("=") for item in sys.argv[2:])
    train, val = digits(int(options.get("count", 320)))
    recipe = Recipe(
        epochs=float(options.get("epochs", 6)),
        batch_size=int(options.get("batch", 16)),
        optimizer=options.get("optimizer", "sgd"),
        lr=float(options.get("lr", 0.05)),
        mixup=float(options.get("mixup", 0)),
        bf16=options.get("bf16") == "1",
        ema_decay=0.98 if options.get("ema", "1") == "1" else None,
        eval_every=2,
        checkpoint_every_s=float(options.get("every", 0.05)),
    )
    plain = options.get("plain") == "1"
    result = fit_model(
        tiny_net(norm=not plain, dropout=0.0 if plain else 0.1),
        train,
        val,
        recipe,
        None if plain else jitter,
        out,
        resume=options.get("resume") == "1",
        devices=int(options.get("devices", 1)),
    )
    sys.stdout.write(json.dumps([line["train_loss"] for line in result.history]) + "\n")


if __name__ == "__main__":
    main()
