"""A run that ends in the middle, as by SIGKILL but within the process."""


class Killed(Exception):
    pass


def kill_at(step):
    def watch(done, loss):
        if done == step:
            raise Killed

    return watch
