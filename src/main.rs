//! The `regfs` command; see [`regfs::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    regfs::cli::main(std::env::args_os(), &std::env::vars_os().collect())
}
