"""Stage `inputs`: fingerprints of the files that parameters point at. Writes `inputs/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.local_inputs import write_inputs
    from sae_research.config.params import load_params

    write_inputs(load_params())


if __name__ == "__main__":
    run_main(main)
