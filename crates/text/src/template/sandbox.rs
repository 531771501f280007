//! Runs template code on a thread whose stack is known.
//!
//! minijinja's parser, code generator and value destructors recurse. Their depth is bounded by the
//! source limit and the fuel; this stack is large enough for the deepest that those bounds allow
//! (see the tests of bombs), whatever thread the caller is on. The pages are reserved, not used:
//! an ordinary rendering touches a few of them.

use crate::TemplateError;

const STACK_BYTES: usize = 512 << 20;

/// Runs `f` on a fresh thread and waits for it. A panic becomes an error.
pub(super) fn run<T: Send>(f: impl FnOnce() -> Result<T, TemplateError> + Send) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("template".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, f)
            .map_err(|e| TemplateError::Thread(e.to_string()))?;
        thread.join().unwrap_or_else(|_| Err(TemplateError::Thread("panicked".to_owned())))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::run;
    use crate::TemplateError;

    #[test]
    fn a_panic_is_an_error() {
        let error = run::<()>(|| panic!("on purpose")).unwrap_err();
        assert!(matches!(error, TemplateError::Thread(_)));
    }
}
