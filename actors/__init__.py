"""Ray: runs functions and classes of loraseg as tasks, actor pools and deployments."""
