"""The stage `dashboards`: a static site to browse latents with. Writes `dashboards/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.runtime.stages import write_disabled

    params = load_params()
    if not params.eval_types.dashboards:
        write_disabled("dashboards")
        return
    from sae_research.analysis.dashboard.site import run_stage

    run_stage(params)


if __name__ == "__main__":
    run_main(main)
