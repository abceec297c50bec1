//! Calls of type output functions, with errors caught.

use std::ffi::CStr;

use pgrx::pg_sys;

use super::datum::{Raw, Varlena};
use super::failure::{Failure, caught};
use super::memory::Context;
use super::user_code;

/// A function of one argument, looked up once (`FmgrInfo`).
///
/// Boxed, because Postgres keeps its address in what the function caches in `fn_extra`.
pub struct Function(Box<pg_sys::FmgrInfo>);

impl Function {
    /// Looks a function up; it may keep its caches in `context` (`fmgr_info_cxt`).
    pub fn lookup(oid: pg_sys::Oid, context: Context) -> Self {
        let mut info = Box::<pg_sys::FmgrInfo>::default();
        // SAFETY: info is a valid FmgrInfo to fill in, and the context outlives it: both end with the plan.
        unsafe { pg_sys::fmgr_info_cxt(oid, &mut *info, context.raw()) };
        Self(info)
    }

    /// `to_jsonb(anyelement)` for values of one type: the polymorphic function learns the type from a call expression.
    pub fn to_jsonb(argument_type: pg_sys::Oid, context: Context) -> Self {
        let mut function = Self::lookup(pg_sys::Oid::from(F_TO_JSONB), context);
        let _entered = context.enter();
        // SAFETY: nodes are made in the plan's context, which lives as long as the FmgrInfo that points to them.
        // get_fn_expr_argtype() reads the type of the first argument from this expression.
        unsafe {
            let argument = pg_sys::makeNullConst(argument_type, -1, pg_sys::InvalidOid);
            let arguments = pg_sys::lappend(std::ptr::null_mut(), argument.cast());
            let call = pg_sys::makeFuncExpr(
                pg_sys::Oid::from(F_TO_JSONB),
                pg_sys::JSONBOID,
                arguments,
                pg_sys::InvalidOid,
                pg_sys::InvalidOid,
                pg_sys::CoercionForm::COERCE_EXPLICIT_CALL,
            );
            function.0.fn_expr = call.cast();
        }
        function
    }

    /// Calls the function (`FunctionCall1Coll`), with its errors [`caught`].
    pub fn call(&mut self, argument: Raw) -> Result<Raw, Failure> {
        let info = &mut *self.0;
        caught("a function of its type", || {
            // SAFETY: the FmgrInfo was looked up for this argument's type, and the argument is not NULL.
            let call = || unsafe {
                pg_sys::FunctionCall1Coll(info, pg_sys::DEFAULT_COLLATION_OID, argument.datum())
            };
            Raw::from(user_code::kept_out(call))
        })
    }

    /// Calls an output function: its C string.
    ///
    /// # Safety
    /// The function must be a type output function (it returns `cstring`). `'a` must not outlive the contents of the
    /// current memory context.
    pub unsafe fn call_cstring<'a>(&mut self, argument: Raw) -> Result<&'a [u8], Failure> {
        let result = self.call(argument)?;
        // SAFETY: output functions return a NUL-terminated string, palloc'd in the current context.
        Ok(unsafe { CStr::from_ptr(result.datum().cast_mut_ptr()) }.to_bytes())
    }

    /// Calls a cast function to `text`: the text's bytes.
    ///
    /// # Safety
    /// The function must return `text`. `'a` as in [`Function::call_cstring`].
    pub unsafe fn call_text<'a>(&mut self, argument: Raw) -> Result<&'a [u8], Failure> {
        let result = self.call(argument)?;
        // SAFETY: the result is a varlena that was made by this call, so it is not an on-disk TOAST pointer.
        Ok(unsafe {
            match result.varlena() {
                Varlena::Inline(bytes) => bytes,
                Varlena::Packed => result.detoast(),
                Varlena::Unchanged => &[],
            }
        })
    }
}

/// pg_proc.dat: to_jsonb(anyelement).
const F_TO_JSONB: u32 = 3787;
