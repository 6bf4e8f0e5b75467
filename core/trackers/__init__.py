"""Experiment trackers: W&B, TensorBoard, Trackio, MLflow. The journal is the source; each tracker follows it.

`process` starts one process for each tracker beside the training (`tracking`) or after it (`command.track`); `worker`
is what runs there: it reads `metrics.jsonl`, knows by `cursor` what was sent, and calls one of `wandb`, `tensorboard`,
`trackio`, `mlflow` behind `base.Tracker`.
"""
