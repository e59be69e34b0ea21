"""Talk with a model, with the template that its adapter was trained with."""

from minitune.chat import ChatConfig, chat
from minitune.config import run_script

if __name__ == "__main__":
    run_script(ChatConfig, chat, __doc__)
