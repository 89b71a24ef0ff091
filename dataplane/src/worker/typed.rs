//! An object that was checked to be a `T`, read as one.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use super::state::Object;
use crate::object::{Archived, StateType, access_checked};

/// A value in the state, read where it lies: dereferences to its archived form, whose fields are those of the type. See [`Object`] for how long
/// it stays.
pub struct Typed<T> {
    object: Object,
    _type: PhantomData<fn() -> T>,
}

impl<T: StateType> Typed<T> {
    /// Of an object that `object::check::<T>` has accepted.
    #[inline]
    pub(super) fn of_checked(object: Object) -> Typed<T> {
        Typed { object, _type: PhantomData }
    }

    /// The same as an object of bytes.
    #[must_use]
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// Which object it is: no other of this process has this version.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.object.version()
    }
}

impl<T: StateType> Deref for Typed<T> {
    type Target = Archived<T>;

    #[inline]
    fn deref(&self) -> &Archived<T> {
        // SAFETY:
        // - in bounds: whoever made this has checked this very object as a `T` (`of_checked`), or the same version of it before.
        // - unshared:  an object that was published is written by nobody: its owner's promise, and with `--isolate` nobody's to break.
        // - unique:    not needed: a shared reference, and `object` keeps the bytes where they are.
        unsafe { access_checked::<T>(&self.object) }
    }
}

impl<T> fmt::Debug for Typed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Typed").field(&self.object).finish()
    }
}
