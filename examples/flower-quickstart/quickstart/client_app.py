"""The client: Flower's quickstart, unchanged."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart import task

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Trains the global model on this node's data."""
    net = task.Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = task.load_data(seed=int(context.node_config["partition-id"]))
    loss = task.train(net, loader, int(context.run_config["local-epochs"]), float(msg.content["config"]["lr"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Measures the global model on this node's data."""
    net = task.Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = task.load_data(seed=1000 + int(context.node_config["partition-id"]))
    metrics = MetricRecord({"accuracy": task.accuracy(net, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
