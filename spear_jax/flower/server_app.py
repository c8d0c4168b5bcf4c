"""The ServerApp: what Flower starts on the server when `flwr run` is given."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from spear_jax.core.compilation import enable_compilation_cache
from spear_jax.flower.server import DeployedRun
from spear_jax.flower.terms import Terms

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment of the app's config, or goes on with it."""
    enable_compilation_cache()
    DeployedRun(grid, Terms.read(context.run_config)).train()
