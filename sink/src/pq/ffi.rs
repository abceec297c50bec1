//! The only `unsafe` code of the sink: libpq's functions, each behind a safe method.
//!
//! Called by `connection` and `copy` only. Three owners keep the pointers right: [`RawConnection`] (PQfinish on drop),
//! [`RawResult`] (PQclear on drop) and [`CopyBuffer`] (PQfreemem on drop). No pointer leaves this file.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

pub(super) use pq::{ConnStatusType, ExecStatusType, PGVerbosity, PostgresPollingStatusType};
use pq_sys as pq;

use super::addresses::Address;
use super::error::{ErrorKind, PqError};
pub use buffer::CopyBuffer;
pub(super) use result::RawResult;

mod buffer;
mod result;

/// Copies a C string that libpq owns; an empty or missing one gives None.
fn owned(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: libpq returns NUL-terminated strings that live as long as the connection or result that the caller of this
    // function holds a reference to; they are copied before it returns.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
    (!text.is_empty()).then_some(text)
}

pub(super) fn c_string(text: impl Into<Vec<u8>>, what: &str) -> Result<CString, PqError> {
    CString::new(text).map_err(|_| PqError::new(ErrorKind::Settings, format!("{what} contains a zero byte")))
}

/// A `PGconn`. One thread at a time may use it, which `&mut self` ensures wherever libpq writes to it.
pub(super) struct RawConnection {
    raw: NonNull<pq::PGconn>,
}

// SAFETY: libpq is thread-safe as long as no two threads use one PGconn at a time. The type is not Sync, and moving it
// to another thread moves the only pointer.
unsafe impl Send for RawConnection {}

impl RawConnection {
    /// PQconnectStartParams: begins to connect, without waiting.
    pub fn start(parameters: &[(CString, CString)]) -> Result<Self, PqError> {
        let mut keywords: Vec<*const c_char> =
            parameters.iter().map(|(keyword, _)| keyword.as_ptr()).collect();
        let mut values: Vec<*const c_char> = parameters.iter().map(|(_, value)| value.as_ptr()).collect();
        keywords.push(ptr::null());
        values.push(ptr::null());
        // SAFETY: both arrays end with NULL and point to strings that outlive the call; libpq copies them. The third
        // argument asks it to expand a connection string in `dbname`.
        let raw = unsafe { pq::PQconnectStartParams(keywords.as_ptr(), values.as_ptr(), 1) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| PqError::new(ErrorKind::Connection, "libpq could not allocate a connection"))?;
        let connection = Self { raw };
        // SAFETY: the connection is valid; the receiver is a function with the signature that libpq documents and uses
        // no argument.
        unsafe { pq::PQsetNoticeReceiver(raw.as_ptr(), Some(receive_notice), ptr::null_mut()) };
        Ok(connection)
    }

    pub fn poll_connect(&mut self) -> PostgresPollingStatusType {
        // SAFETY: `raw` is a live PGconn that only this thread uses.
        unsafe { pq::PQconnectPoll(self.raw.as_ptr()) }
    }

    /// What it is connected to, or connecting to.
    pub fn address(&self) -> Address {
        // SAFETY: as in `is_ok`; the three return strings that the connection owns, or NULL, and they are copied at once.
        let [host, hostaddr, port] = unsafe {
            let raw = self.raw.as_ptr();
            [pq::PQhost(raw), pq::PQhostaddr(raw), pq::PQport(raw)].map(|text| owned(text))
        };
        Address {
            host: host.unwrap_or_default(),
            hostaddr: hostaddr.unwrap_or_default(),
            port: port.unwrap_or_default(),
        }
    }

    pub fn set_verbosity(&mut self, verbosity: PGVerbosity) {
        // SAFETY: as in `poll_connect`.
        unsafe { pq::PQsetErrorVerbosity(self.raw.as_ptr(), verbosity) };
    }

    pub fn is_ok(&self) -> bool {
        // SAFETY: as in `poll_connect`; PQstatus only reads.
        unsafe { pq::PQstatus(self.raw.as_ptr()) == ConnStatusType::CONNECTION_OK }
    }

    pub fn is_bad(&self) -> bool {
        // SAFETY: as in `is_ok`.
        unsafe { pq::PQstatus(self.raw.as_ptr()) == ConnStatusType::CONNECTION_BAD }
    }

    pub fn error_message(&self) -> String {
        // SAFETY: PQerrorMessage returns a string that the connection owns; it is copied at once.
        owned(unsafe { pq::PQerrorMessage(self.raw.as_ptr()) })
            .map(|text| text.trim_end().to_owned())
            .unwrap_or_else(|| "libpq gave no reason".to_owned())
    }

    pub fn server_version(&self) -> i32 {
        // SAFETY: as in `is_ok`.
        unsafe { pq::PQserverVersion(self.raw.as_ptr()) }
    }

    /// The value of a connection option, as it came out of string, service file, environment and defaults.
    pub fn option(&self, keyword: &str) -> Option<String> {
        // SAFETY: PQconninfo allocates an array that ends with a NULL keyword, or returns NULL when out of memory.
        let options = unsafe { pq::PQconninfo(self.raw.as_ptr()) };
        let mut at = options;
        let mut value = None;
        // SAFETY: `at` walks the array from its start and stops at the entry whose keyword is NULL.
        while !at.is_null() && unsafe { !(*at).keyword.is_null() } {
            // SAFETY: this entry is inside the array; keyword and value are NUL-terminated or NULL.
            let (name, text) = unsafe { (owned((*at).keyword), owned((*at).val)) };
            if name.as_deref() == Some(keyword) {
                value = text;
            }
            // SAFETY: the entry before was not the last one, so the next one is still inside the array.
            at = unsafe { at.add(1) };
        }
        // SAFETY: the array comes from PQconninfo and is not used again; NULL is allowed.
        unsafe { pq::PQconninfoFree(options) };
        value
    }

    /// The socket, to be waited on. None while there is no connection.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: as in `is_ok`.
        let fd = unsafe { pq::PQsocket(self.raw.as_ptr()) };
        if fd < 0 {
            return None;
        }
        // SAFETY: libpq keeps the socket open for as long as the connection is not changed, which the borrow of `self`
        // rules out.
        Some(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// PQsendQueryParams when there are parameters or binary results are wanted; PQsendQuery otherwise, which alone
    /// takes replication commands and several statements.
    pub fn send(
        &mut self,
        sql: &CStr,
        params: Option<&[Option<CString>]>,
        binary: bool,
    ) -> Result<(), PqError> {
        let sent = match params {
            // SAFETY: the connection is ours and `sql` is NUL-terminated; libpq copies it.
            None => unsafe { pq::PQsendQuery(self.raw.as_ptr(), sql.as_ptr()) },
            Some(params) => {
                let values: Vec<*const c_char> = params
                    .iter()
                    .map(|value| value.as_ref().map_or(ptr::null(), |value| value.as_ptr()))
                    .collect();
                let count = c_int::try_from(values.len())
                    .map_err(|_| PqError::new(ErrorKind::Protocol, "too many query parameters"))?;
                // SAFETY: `values` has `count` entries, each NULL or a NUL-terminated string that outlives the call; with
                // text format, libpq ignores types, lengths and formats given as NULL.
                unsafe {
                    pq::PQsendQueryParams(
                        self.raw.as_ptr(),
                        sql.as_ptr(),
                        count,
                        ptr::null(),
                        values.as_ptr(),
                        ptr::null(),
                        ptr::null(),
                        c_int::from(binary),
                    )
                }
            }
        };
        if sent == 1 {
            Ok(())
        } else {
            Err(self.connection_error())
        }
    }

    /// From here on each row of what was sent is a result by itself. Only right behind [`Self::send`].
    pub fn row_by_row(&mut self) -> Result<(), PqError> {
        // SAFETY: as in `poll_connect`.
        match unsafe { pq::PQsetSingleRowMode(self.raw.as_ptr()) } {
            1 => Ok(()),
            _ => Err(PqError::new(
                ErrorKind::Protocol,
                "libpq does not give rows one by one",
            )),
        }
    }

    /// The next result of what was sent; None when there is no more. Blocks unless [`Self::is_busy`] is false.
    pub fn next_result(&mut self) -> Option<RawResult> {
        // SAFETY: the connection is ours; the result is handed to a RawResult, which clears it.
        NonNull::new(unsafe { pq::PQgetResult(self.raw.as_ptr()) }).map(RawResult::new)
    }

    pub fn is_busy(&mut self) -> bool {
        // SAFETY: as in `poll_connect`.
        unsafe { pq::PQisBusy(self.raw.as_ptr()) == 1 }
    }

    /// Reads what has arrived. False when the connection is lost; what came before may still be in the buffer.
    pub fn consume_input(&mut self) -> bool {
        // SAFETY: as in `poll_connect`.
        unsafe { pq::PQconsumeInput(self.raw.as_ptr()) == 1 }
    }

    pub fn set_nonblocking(&mut self) -> bool {
        // SAFETY: as in `poll_connect`.
        unsafe { pq::PQsetnonblocking(self.raw.as_ptr(), 1) == 0 }
    }

    /// Sends what is buffered. Ok(true): all is sent.
    pub fn flush(&mut self) -> Result<bool, PqError> {
        // SAFETY: as in `poll_connect`.
        match unsafe { pq::PQflush(self.raw.as_ptr()) } {
            0 => Ok(true),
            1 => Ok(false),
            _ => Err(self.connection_error()),
        }
    }

    /// Ok(false): the buffer is full, try again once the socket can be written to.
    pub fn put_copy_data(&mut self, bytes: &[u8]) -> Result<bool, PqError> {
        let length = c_int::try_from(bytes.len())
            .map_err(|_| PqError::new(ErrorKind::Protocol, "a COPY message of more than 2 GiB"))?;
        // SAFETY: the pointer is valid for `length` bytes, which libpq copies.
        match unsafe { pq::PQputCopyData(self.raw.as_ptr(), bytes.as_ptr().cast(), length) } {
            1 => Ok(true),
            0 => Ok(false),
            _ => Err(self.connection_error()),
        }
    }

    pub fn put_copy_end(&mut self) -> Result<(), PqError> {
        // SAFETY: NULL as message ends the COPY without an error.
        match unsafe { pq::PQputCopyEnd(self.raw.as_ptr(), ptr::null()) } {
            -1 => Err(self.connection_error()),
            _ => Ok(()),
        }
    }

    /// PQgetCopyData without waiting.
    pub fn get_copy_data(&mut self) -> CopyState {
        let mut buffer: *mut c_char = ptr::null_mut();
        // SAFETY: `buffer` is a valid place for the pointer; asynchronous mode never blocks.
        let length = unsafe { pq::PQgetCopyData(self.raw.as_ptr(), &raw mut buffer, 1) };
        match (NonNull::new(buffer), usize::try_from(length)) {
            (Some(buffer), Ok(length)) if length > 0 => CopyState::Data(CopyBuffer::new(buffer, length)),
            (_, Ok(_)) => CopyState::WouldBlock,
            (_, Err(_)) if length == -1 => CopyState::Done,
            _ => CopyState::Failed,
        }
    }

    /// What can cancel a query of this connection from another thread.
    pub fn cancel_token(&self) -> Option<RawCancel> {
        // SAFETY: PQgetCancel copies what it needs out of the connection.
        NonNull::new(unsafe { pq::PQgetCancel(self.raw.as_ptr()) }).map(|raw| RawCancel { raw })
    }

    pub fn connection_error(&self) -> PqError {
        PqError::new(ErrorKind::Connection, self.error_message())
    }
}

impl Drop for RawConnection {
    fn drop(&mut self) {
        // SAFETY: the pointer is live and nobody uses it after this.
        unsafe { pq::PQfinish(self.raw.as_ptr()) }
    }
}

/// What [`RawConnection::get_copy_data`] found.
pub(super) enum CopyState {
    Data(CopyBuffer),
    WouldBlock,
    Done,
    Failed,
}

/// A `PGcancel`.
pub(super) struct RawCancel {
    raw: NonNull<pq::PGcancel>,
}

// SAFETY: libpq documents that a PGcancel may be used from any thread, also while the connection is in use elsewhere.
unsafe impl Send for RawCancel {}
// SAFETY: PQcancel only reads the object.
unsafe impl Sync for RawCancel {}

impl RawCancel {
    pub fn cancel(&self) -> Result<(), PqError> {
        let mut text = [0 as c_char; 256];
        let size = c_int::try_from(text.len()).unwrap_or(0);
        // SAFETY: the buffer is as long as said; libpq writes a NUL-terminated text into it on failure.
        if unsafe { pq::PQcancel(self.raw.as_ptr(), text.as_mut_ptr(), size) } == 1 {
            return Ok(());
        }
        let reason = owned(text.as_ptr()).unwrap_or_else(|| "no reason given".to_owned());
        Err(PqError::new(
            ErrorKind::Connection,
            format!("cannot send a cancel request: {}", reason.trim_end()),
        ))
    }
}

impl Drop for RawCancel {
    fn drop(&mut self) {
        // SAFETY: the pointer is live and nobody uses it after this.
        unsafe { pq::PQfreeCancel(self.raw.as_ptr()) }
    }
}

/// Sends notices and warnings to the log instead of stderr. INVARIANT I8: the primary message only.
extern "C" fn receive_notice(_argument: *mut c_void, result: *const pq::PGresult) {
    if result.is_null() {
        return;
    }
    // SAFETY: libpq lends the result for the time of the call; a missing field gives NULL.
    let field = |code: u8| owned(unsafe { pq::PQresultErrorField(result, c_int::from(code)) });
    tracing::debug!(
        severity = field(b'V').unwrap_or_default(),
        sqlstate = field(b'C').unwrap_or_default(),
        "Postgres says: {}",
        field(b'M').unwrap_or_default()
    );
}
