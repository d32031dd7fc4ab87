//! One call site: the inlined function that calls through a table slot and records itself.

use proc_macro2::{Literal, TokenStream};
use quote::quote;

use crate::convention::{CallKind, VECTOR_CLOBBERS, Width, X86_64};
use crate::family::{Kind, Operation};

/// Bytes of `call [rip + disp32]` and of `jmp [rip + disp32]`.
pub(crate) const CALL_LEN: usize = 6;

/// The body of an operation's function: evaluates to its result.
pub(crate) fn body(index: usize, op: &Operation) -> TokenStream {
    let kind = match op.kind {
        Kind::Direct => return direct(index, op),
        Kind::Plain => CallKind::Plain,
        Kind::CalleeSave => CallKind::CalleeSave,
        Kind::Jump => CallKind::Jump,
    };
    let lost = X86_64.clobbers(kind);
    let names = &op.parts.names;

    let branch = if kind == CallKind::Jump { "jmp" } else { "call" };
    let branch = format!("{branch} qword ptr [rip + {{pvops_table}} + {{pvops_slot}}]");
    let padding = format!(".skip {}, 0x90", op.room - CALL_LEN);
    let record = format!(".byte 772b - 771b, {}", kind as u8);
    let clobbers = format!(".short {}", lost.bits());

    let mut operands = Vec::new();
    for (name, register) in names.iter().zip(X86_64.args) {
        let text = register.name(Width::Bits64);
        operands.push(if lost.contains(*register) {
            quote!(inout(#text) #name => _)
        } else {
            quote!(in(#text) #name)
        });
    }
    let taken = &X86_64.args[..names.len()];
    for register in lost.iter().filter(|r| !taken.contains(r)) {
        let text = register.name(Width::Bits64);
        operands.push(if X86_64.ret.contains(&register) && op.parts.ret.is_some() {
            quote!(lateout(#text) pvops_result)
        } else {
            quote!(lateout(#text) _)
        });
    }
    if kind == CallKind::Jump {
        operands.push(quote!(options(noreturn)));
    } else {
        for vector in VECTOR_CLOBBERS {
            operands.push(quote!(#[cfg(target_feature = "sse")] lateout(#vector) _));
        }
    }
    let slot = Literal::usize_unsuffixed(index * 8);
    let (declare, result) = match &op.parts.ret {
        Some(ty) => (
            quote!(let pvops_result: usize;),
            quote!(<#ty as ::pvops::Word>::from_word(pvops_result)),
        ),
        None => (quote!(), quote!()),
    };
    quote! {
        #(let #names = ::pvops::Word::into_word(#names);)*
        #declare
        // SAFETY: the slot holds the address of a function of this signature and
        // convention (the table's type sees to it), and everything the convention lets it
        // lose is listed. The patcher replaces the call only by what keeps within that.
        unsafe {
            ::core::arch::asm!(
                "771:",
                // A callee that runs while its site is patched returns to the site's end,
                // where every form has one.
                #padding,
                #branch,
                "772:",
                ".pushsection pvops_sites, \"aR\", @progbits",
                ".balign 4",
                ".long 771b - .",
                ".long {pvops_table} + {pvops_slot} - .",
                #record,
                #clobbers,
                ".popsection",
                pvops_table = sym TABLE,
                pvops_slot = const #slot,
                #(#operands,)*
            )
        }
        #result
    }
}

/// An operation that is never patched: an ordinary call through the pointer.
fn direct(index: usize, op: &Operation) -> TokenStream {
    let (unsafety, names, types) = (&op.unsafety, &op.parts.names, &op.parts.types);
    let ret = op.parts.ret.iter();
    quote! {
        // SAFETY: the slot holds the address of a function of exactly this type: only
        // `Binding`s of the op's own pointer type are ever stored there.
        let pvops_callee = unsafe {
            ::core::mem::transmute::<
                *const (),
                #unsafety extern "sysv64" fn(#(#types),*) #(-> #ret)*
            >(TABLE.load(#index))
        };
        // SAFETY: the caller's promise, if the op asks for one, passed on.
        #[allow(unused_unsafe)]
        unsafe { pvops_callee(#(#names),*) }
    }
}
