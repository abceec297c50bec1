//! `walmirror.adds_value(pg_ddl_command)`, `walmirror.only_adds(pg_ddl_command)` and `walmirror.defers_index(pg_ddl_command)`: what the tag
//! of a command does not tell.

use pgrx::pg_sys;
use pgrx::prelude::*;

/// The version-1 calling convention's record (PG_FUNCTION_INFO_V1).
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_walmirror_adds_value() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_walmirror_only_adds() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

/// The same.
#[unsafe(no_mangle)]
pub extern "C" fn pg_finfo_walmirror_defers_index() -> &'static pg_sys::Pg_finfo_record {
    &V1
}

const V1: pg_sys::Pg_finfo_record = pg_sys::Pg_finfo_record { api_version: 1 };

/// `adds_value(pg_ddl_command) RETURNS boolean`, strict: whether a command of `pg_event_trigger_ddl_commands()` is ALTER TYPE … ADD
/// VALUE, with which no value that is stored can change, as it does with RENAME VALUE.
///
/// # Safety
/// Called by the function manager with one non-NULL argument of that type.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn walmirror_adds_value(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: by the caller's promise. A statement that was collected by itself is in the command's tree.
    let adds = unsafe {
        command(call).is_some_and(|command| {
            command.type_ == pg_sys::CollectedCommandType::SCT_Simple
                && pgrx::is_a(command.parsetree, pg_sys::NodeTag::T_AlterEnumStmt)
                && (*command.parsetree.cast::<pg_sys::AlterEnumStmt>())
                    .oldVal
                    .is_null()
        })
    };
    pg_sys::Datum::from(adds)
}

/// `only_adds(pg_ddl_command) RETURNS boolean`, strict: whether such a command is an ALTER TABLE that takes nothing away that a label
/// may rest on, as what a restore does to a table before its indexes are complete.
///
/// # Safety
/// As for `adds_value`.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn walmirror_only_adds(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: by the caller's promise.
    let adds = unsafe {
        command(call)
            .and_then(|command| parts(command))
            .is_some_and(|parts| {
                parts
                    .iter()
                    .all(|part| part.is_some_and(|part| ADD.contains(&part.subtype)))
            })
    };
    pg_sys::Datum::from(adds)
}

/// `defers_index(pg_ddl_command) RETURNS boolean`, strict: whether such a command is an ALTER TABLE that makes a deferrable constraint of
/// an index that was there. Until then it was checked at once, and a key may rest on that.
///
/// # Safety
/// As for `adds_value`.
#[unsafe(no_mangle)]
#[pg_guard]
pub unsafe extern "C-unwind" fn walmirror_defers_index(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: by the caller's promise. The definition of such a part is an IndexStmt.
    let defers = unsafe {
        command(call)
            .and_then(|command| parts(command))
            .is_some_and(|parts| {
                parts.iter().flatten().any(|part| {
                    part.subtype == pg_sys::AlterTableType::AT_AddIndexConstraint
                        && pgrx::is_a(part.def, pg_sys::NodeTag::T_IndexStmt)
                        && (*part.def.cast::<pg_sys::IndexStmt>()).deferrable
                })
            })
    };
    pg_sys::Datum::from(defers)
}

/// The parts of an ALTER TABLE; None for what is no such command. A part that is no AlterTableCmd is None.
///
/// # Safety
/// `command` must come from [`command`].
unsafe fn parts(command: &pg_sys::CollectedCommand) -> Option<Vec<Option<&pg_sys::AlterTableCmd>>> {
    if command.type_ != pg_sys::CollectedCommandType::SCT_AlterTable {
        return None;
    }
    // SAFETY: by the caller's promise. The subcommands of an ALTER TABLE are a list of CollectedATSubcmd, each with its tree.
    unsafe {
        let parts = command.d.alterTable.subcmds.as_ref()?;
        let count = usize::try_from(parts.length).unwrap_or(0);
        let cells = std::slice::from_raw_parts(parts.elements, count);
        Some(
            cells
                .iter()
                .map(|cell| {
                    let tree = (*cell.ptr_value.cast::<pg_sys::CollectedATSubcmd>()).parsetree;
                    if pgrx::is_a(tree, pg_sys::NodeTag::T_AlterTableCmd) {
                        tree.cast::<pg_sys::AlterTableCmd>().as_ref()
                    } else {
                        None
                    }
                })
                .collect(),
        )
    }
}

/// Parts of an ALTER TABLE, as they stand between the indexes of a dump.
const ADD: [pg_sys::AlterTableType::Type; 5] = [
    pg_sys::AlterTableType::AT_AddConstraint,
    pg_sys::AlterTableType::AT_AddIndex,
    pg_sys::AlterTableType::AT_AddIndexConstraint,
    pg_sys::AlterTableType::AT_SetNotNull,
    pg_sys::AlterTableType::AT_ClusterOn,
];

/// The one argument. A pg_ddl_command is a pointer to a CollectedCommand, and comes from pg_event_trigger_ddl_commands() alone, while
/// that command ends.
///
/// # Safety
/// The call has one non-NULL argument of that type.
unsafe fn command<'a>(call: pg_sys::FunctionCallInfo) -> Option<&'a pg_sys::CollectedCommand> {
    // SAFETY: by the caller's promise.
    unsafe {
        let argument = (*call).args.as_slice(1).first()?.value;
        argument.cast_mut_ptr::<pg_sys::CollectedCommand>().as_ref()
    }
}
