"""What tests of commands share with those of what the commands do."""

from tests.advice.conftest import trace_file as trace_file
