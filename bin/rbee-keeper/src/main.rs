//! rbee: the command line.

fn main() {
    let code = rbee_keeper::run(std::env::args_os(), &|name| std::env::var(name).ok());
    // Not by returning: a thread that writes to a reader who stands still would be waited for.
    std::process::exit(i32::from(code));
}
