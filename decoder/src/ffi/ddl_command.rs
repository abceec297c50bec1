//! `walmirror.adds_value(pg_ddl_command)`: what the command tag of an ALTER TYPE does not tell.

use pgrx::pg_sys;
use pgrx::prelude::*;

/// The version-1 calling convention's record (PG_FUNCTION_INFO_V1).
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_walmirror_adds_value() -> &'static pg_sys::Pg_finfo_record {
    const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };
    &V1
}

/// `adds_value(pg_ddl_command) RETURNS boolean`, strict: whether a command of `pg_event_trigger_ddl_commands()` is ALTER TYPE … ADD
/// VALUE, with which no value that is stored can change, as it does with RENAME VALUE.
///
/// # Safety
/// Called by the function manager with one non-NULL argument of that type.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn walmirror_adds_value(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: a strict function of one argument. A pg_ddl_command is a pointer to a CollectedCommand, and comes from
    // pg_event_trigger_ddl_commands() alone, while that command ends; a statement that was collected by itself is in its tree.
    let adds = unsafe {
        let argument = (*call).args.as_slice(1).first().map(|argument| argument.value);
        let command: *mut pg_sys::CollectedCommand =
            argument.map_or(std::ptr::null_mut(), |argument| argument.cast_mut_ptr());
        !command.is_null()
            && (*command).type_ == pg_sys::CollectedCommandType::SCT_Simple
            && pgrx::is_a((*command).parsetree, pg_sys::NodeTag::T_AlterEnumStmt)
            && (*(*command).parsetree.cast::<pg_sys::AlterEnumStmt>())
                .oldVal
                .is_null()
    };
    pg_sys::Datum::from(adds)
}
