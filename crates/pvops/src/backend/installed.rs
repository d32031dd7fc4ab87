//! What a kernel hands a backend once, and its ops look up on every call.

use core::sync::atomic::{AtomicPtr, Ordering};

/// A place for one `&'static T`, empty at first.
#[derive(Debug)]
pub(crate) struct Installed<T: 'static>(AtomicPtr<T>);

impl<T: Sync> Installed<T> {
    pub(crate) const fn empty() -> Self {
        Self(AtomicPtr::new(core::ptr::null_mut()))
    }

    pub(crate) fn set(&self, value: &'static T) {
        self.0.store(core::ptr::from_ref(value).cast_mut(), Ordering::Release);
    }

    pub(crate) fn get(&self) -> Option<&'static T> {
        // SAFETY: null, or what `set` was given: shared, and there for good.
        unsafe { self.0.load(Ordering::Acquire).as_ref() }
    }
}
