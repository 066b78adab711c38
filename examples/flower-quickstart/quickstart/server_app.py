"""The server: Flower's quickstart with one line changed, and the import that it needs."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedeat.flower import GeometricMedian
from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federates the model over all nodes and saves it."""
    arrays = ArrayRecord(Net().state_dict())
    # strategy = FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])
    strategy = GeometricMedian(fraction_evaluate=context.run_config["fraction-evaluate"])
    result = strategy.start(
        grid=grid,
        initial_arrays=arrays,
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")
