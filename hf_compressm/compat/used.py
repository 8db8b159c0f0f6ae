"""What is private or unofficial in other libraries and touched here, and the versions that it was checked on; a test looks for it."""

from __future__ import annotations

CHECKED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.23", "5.24"),
    "accelerate": ("1.15",),
    "deepspeed": ("0.19",),
}

USED = {
    "transformers.configuration_utils._commit_hash": "the revision that a config was loaded from",
    "transformers.modeling_utils.PreTrainedModel._upload_modified_files": "save_pretrained(push_to_hub=True) and "
    "push_to_hub write a card of their own after the model is saved, and only this comes after it",
    "transformers.modeling_utils.split_torch_state_dict_into_shards": "save_pretrained asks it which tensors go to which file",
    "transformers.trainer.Trainer._push_from_checkpoint": "copies weights and config to the folder that it uploads, and no "
    "other file; its event comes before the copies",
    "transformers.trainer.Trainer._get_output_dir": "where a checkpoint is being written, in a hyperparameter search, too",
    "torch.nn.parallel.distributed.DistributedDataParallel._comm_hooks": "to register them again with a new reducer",
    "transformers.models.falcon_h1.modeling_falcon_h1.FalconH1PreTrainedModel._init_weights": "copies multipliers of one "
    "length to all layers (in modeling/modeling_compressm.py, which stands alone beside saved models)",
    "accelerate.state.PartialState._shared_state": "a Trainer resets Accelerate's global state, which Accelerators of others use",
    "accelerate.state.AcceleratorState._shared_state": "the same",
    "accelerate.state.GradientState._shared_state": "the same",
    "accelerate.hooks.AlignDevicesHook": "its attributes execution_device, weights_map and original_devices, as `module._hf_hook`: "
    "where the weights of an offloaded module are, and where they are computed with",
    "accelerate.hooks.add_hook_to_module": "keeps the `forward` of the module's class as `module._old_forward`",
    "torch.distributed.distributed_c10d._get_default_store": "where the processes of a group find each other: it answers also "
    "where a collective would wait for a process that never comes",
    "torch._dynamo.utils.counters": "whether anything was compiled that has to be compiled again",
    "torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam": "all that FSDP2 keeps of a parameter, its shapes among it: made "
    "anew for another shape. Of its attributes, those in `FSDP2_ATTRIBUTES`",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule._get_fsdp_state": "where they are: _fsdp_param_groups, which before "
    "2.12 was one, _fsdp_param_group, and the fsdp_params of each",
    "torch.distributed.fsdp._flat_param.FlatParamHandle": "all that FSDP1 keeps of a unit's parameters, made anew for other shapes "
    "(`compat.fsdp1`), by the next one",
    "torch.distributed.fsdp._init_utils._init_param_handle_from_params": "makes it as FSDP1's constructor does",
    "torch.distributed.fsdp._runtime_utils._reshard": "frees what a pass outside of training left gathered",
    "torch.distributed.fsdp.FullyShardedDataParallel._reset_lazy_init": "lets the next forward pass know the new units",
    "transformers.trainer.Trainer._load_from_checkpoint": "under FSDP2 a model must have a checkpoint's sizes before its weights are "
    "loaded, and no event comes between its sharding and that",
    "transformers.trainer.Trainer._load_best_model": "the same",
    "transformers.trainer.Trainer._prepare_for_training": "the same, under FSDP1 and DeepSpeed",
}
