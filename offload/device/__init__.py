"""Where experts are computed: the CPU, an accelerator, an emulated one. Only this folder names torch.cuda."""
