"""A machine with a GPU may be taken away: a failure is told when it happens, and not at the end."""


class ToldAtOnce:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None and report.nodeid.startswith("tests/gpu/"):
            reporter.write_line(f"\n{report.longreprtext}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that prints
        config.pluginmanager.register(ToldAtOnce(config))
