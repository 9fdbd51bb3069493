"""The stage `dashboards`: a static site to browse latents with. Writes `dashboards/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.analysis.dashboard.site import run_stage
    from sae_research.config.params import load_params

    run_stage(load_params())


if __name__ == "__main__":
    run_main(main)
