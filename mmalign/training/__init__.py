"""Training, both stages.

    loop.py            train(config): builds the parts, runs the steps, logs, evaluates, saves
    trainer.py         Trainer.train_step: micro-batches -> loss -> gradients -> optimizer
      build.py         paths, dataset, loader and model of a configuration
      warm_up.py       compiles the kernels beside that, once per node
      sharding.py      DDP and FSDP2
      optimizer.py     the Optimizer protocol and AdamW; schedule.py: the learning rate
      step_result.py   a step's numbers, copied to the host while the next step runs
      guards.py        non-finite steps, loss spikes
    metrics.py         metrics.jsonl, progress bar, TensorBoard; telemetry.py: rates, MFU, NVML;
                       weights_and_biases.py: the same on that service
    run_folder.py      config.json, and whether a command matches it
    unused.py          settings of a command that others turn off
    inputs.py          inputs.json: what the run is made from, by content, and its identity
    checkpoint/        atomic, checksummed, written in the background; for any number of ranks;
                       read without executing anything
    export.py          Hugging Face folders at the end
    memory/            the memory that a run needs, from shapes; decides "auto"
    profile/           --profile: trace, categories, roofline bounds
    heartbeat.py       names the rank that hangs; out_of_memory.py: the setting that helps

One direction: loop -> profile -> trainer -> the parts. The loss takes three steps to the console:
StepResult.wait -> TrainingLoop._read -> Metrics.log.
"""
